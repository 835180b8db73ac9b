// The kernels of quant_linear on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

Kernels kernels_for(Isa isa) {
#if DFQVIT_X86  // bytes without VNNI: AVX-512 would gain little
  if (isa == Isa::amx) return {amx::quantize, amx::linear};
  if (isa == Isa::avx512 && has_avx512_vnni()) return {avx512::quantize, avx512::linear};
#if DFQVIT_AVXVNNI
  if (isa >= Isa::avx2 && has_avx_vnni()) return {avxvnni::quantize, avxvnni::linear};
#endif
  if (isa >= Isa::avx2) return {avx2::quantize, avx2::linear};
#elif DFQVIT_ARM
  if (isa == Isa::i8mm) return {neon::quantize, i8mm::linear};
  if (isa == Isa::dotprod) return {neon::quantize, dotprod::linear};
  if (isa == Isa::neon) return {neon::quantize, neon::linear};
#endif
  (void)isa;
  return {portable::quantize, portable::linear};
}

}  // namespace quant
}  // namespace dfqvit
