// The kernels of quantize_heads on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/quantize_heads.h"

namespace dfqvit {
namespace quant {

HeadsKernel heads_kernel_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return avx512::quantize_heads;
  if (isa >= Isa::avx2) return avx2::quantize_heads;
#elif DFQVIT_ARM
  if (isa != Isa::portable) return neon::quantize_heads;
#endif
  (void)isa;
  return portable::quantize_heads;
}

}  // namespace quant
}  // namespace dfqvit
