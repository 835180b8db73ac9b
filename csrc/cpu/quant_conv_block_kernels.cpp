// The depthwise convolution of quant_conv_block on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/quant_conv_block_kernels.h"

namespace dfqvit {
namespace quant {

DepthwiseKernel depthwise_kernel_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return avx512::depthwise;
  if (isa >= Isa::avx2) return avx2::depthwise;
#elif DFQVIT_ARM
  if (isa != Isa::portable) return neon::depthwise;
#endif
  (void)isa;
  return portable::depthwise;
}

}  // namespace quant
}  // namespace dfqvit
