// The kernels of layer_norm_quantize on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/layer_norm_quantize.h"

namespace dfqvit {
namespace quant {

NormKernel norm_kernel_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return avx512::norm;
  if (isa >= Isa::avx2) return avx2::norm;
#elif DFQVIT_ARM
  if (isa != Isa::portable) return neon::norm;
#endif
  (void)isa;
  return portable::norm;
}

}  // namespace quant
}  // namespace dfqvit
