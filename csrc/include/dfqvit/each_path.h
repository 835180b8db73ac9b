// Includes the file that DFQVIT_BODY names once for each CPU path, with DFQVIT_PATH (a namespace), DFQVIT_SIMD (one of
// simd.h) and DFQVIT_TARGET set. avxvnni, amx, dotprod and i8mm differ from the path before them in products of
// integers alone: only if DFQVIT_WITH_PRODUCTS is defined. Meant to be included again: no include guard.
#define DFQVIT_PATH portable
#define DFQVIT_SIMD portable
#define DFQVIT_TARGET
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#if DFQVIT_X86
#define DFQVIT_PATH avx2
#define DFQVIT_SIMD avx2
#define DFQVIT_TARGET DFQVIT_TARGET_AVX2
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#if DFQVIT_AVXVNNI && defined(DFQVIT_WITH_PRODUCTS)
#define DFQVIT_PATH avxvnni
#define DFQVIT_SIMD avx2
#define DFQVIT_TARGET DFQVIT_TARGET_AVXVNNI
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET
#endif

#define DFQVIT_PATH avx512
#define DFQVIT_SIMD avx512
#define DFQVIT_TARGET DFQVIT_TARGET_VNNI
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#ifdef DFQVIT_WITH_PRODUCTS
#define DFQVIT_PATH amx
#define DFQVIT_SIMD avx512
#define DFQVIT_TARGET DFQVIT_TARGET_AMX
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET
#endif
#endif

#if DFQVIT_ARM
#define DFQVIT_PATH neon
#define DFQVIT_SIMD neon
#define DFQVIT_TARGET
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#ifdef DFQVIT_WITH_PRODUCTS
#define DFQVIT_PATH dotprod
#define DFQVIT_SIMD neon
#define DFQVIT_TARGET DFQVIT_TARGET_DOTPROD
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#define DFQVIT_PATH i8mm
#define DFQVIT_SIMD neon
#define DFQVIT_TARGET DFQVIT_TARGET_I8MM
#include DFQVIT_BODY
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET
#endif
#endif

#undef DFQVIT_BODY
#undef DFQVIT_WITH_PRODUCTS
