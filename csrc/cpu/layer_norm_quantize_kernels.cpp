// The kernels of layer_norm_quantize on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/layer_norm_quantize.h"

namespace dfqvit {
namespace quant {

NormKernels norm_kernels_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return {avx512::norm, avx512::norm_and_add};
  if (isa >= Isa::avx2) return {avx2::norm, avx2::norm_and_add};
#elif DFQVIT_ARM
  if (isa != Isa::portable) return {neon::norm, neon::norm_and_add};
#endif
  (void)isa;
  return {portable::norm, portable::norm_and_add};
}

}  // namespace quant
}  // namespace dfqvit
