// The instruction sets of x86 and ARM CPUs that kernels have paths for, chosen at run time. No torch headers.
#pragma once

#include <string>

namespace dfqvit {

// In order: each has what those before it have. amx is avx512 with VNNI and the int8 tiles; dotprod is neon with sums
// of products of bytes (udot, sdot), i8mm with products of small matrices of bytes (usmmla) too.
#if defined(__aarch64__) || defined(_M_ARM64)
enum class Isa : int { portable = 0, neon = 1, dotprod = 2, i8mm = 3 };
#else
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };
#endif

// The best path that this processor and this build can run.
Isa detected_isa();

// The path in use: detected_isa(), unless DFQVIT_CPU_ISA or set_active_isa asked for a lesser one.
Isa active_isa();

// Uses `isa` from now on, in every thread. Throws std::invalid_argument when this processor lacks it.
void set_active_isa(Isa isa);

// Whether this processor multiplies bytes in AVX-512 (dpbusd); not every one of Isa::avx512 does.
bool has_avx512_vnni();

// Whether it does so in vectors of 256 bits without AVX-512, as Intel's since Alder Lake do.
bool has_avx_vnni();

const char* isa_name(Isa isa);

// The inverse of isa_name. Throws std::invalid_argument that lists the names of this architecture.
Isa isa_from_name(const std::string& name);

}  // namespace dfqvit

// Function attributes for the paths, so that one translation unit holds all of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define DFQVIT_X86 1
#define DFQVIT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define DFQVIT_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define DFQVIT_TARGET_VNNI __attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define DFQVIT_TARGET_AMX \
  __attribute__((target("amx-tile,amx-int8,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define DFQVIT_AVXVNNI 1
#define DFQVIT_TARGET_AVXVNNI __attribute__((target("avxvnni,avx2,fma,f16c")))
#endif
#else
#define DFQVIT_X86 0
#define DFQVIT_TARGET_AVX2
#define DFQVIT_TARGET_AVX512
#endif

#ifndef DFQVIT_AVXVNNI  // older compilers lack its intrinsics
#define DFQVIT_AVXVNNI 0
#endif

// NEON itself is a part of every 64-bit ARM, and needs no attribute. Older compilers lack the others' intrinsics.
#if defined(__aarch64__) && !defined(__AARCH64EB__) && \
    ((defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10))
#define DFQVIT_ARM 1
#define DFQVIT_TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define DFQVIT_TARGET_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#else
#define DFQVIT_ARM 0
#endif

namespace dfqvit {

// Of a function that was compiled three times the one for `isa`. On ARM there is one: the compiler's own vectors are
// NEON's.
template <class Function>
Function version_for(Isa isa, Function avx512, Function avx2, Function portable) {
#if DFQVIT_X86
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : portable;
#else
  (void)isa, (void)avx512, (void)avx2;
  return portable;
#endif
}

}  // namespace dfqvit
