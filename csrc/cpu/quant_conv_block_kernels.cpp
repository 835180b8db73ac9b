// The kernels of quant_conv_block alone on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/quant_conv_block_kernels.h"

namespace dfqvit {
namespace quant {

ConvKernels conv_kernels_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return {avx512::depthwise, avx512::sum_squares};
  if (isa >= Isa::avx2) return {avx2::depthwise, avx2::sum_squares};
#elif DFQVIT_ARM
  if (isa != Isa::portable) return {neon::depthwise, neon::sum_squares};
#endif
  (void)isa;
  return {portable::depthwise, portable::sum_squares};
}

}  // namespace quant
}  // namespace dfqvit
