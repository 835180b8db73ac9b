// The kernels of gate_quantize on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/gate_quantize.h"

namespace dfqvit {
namespace quant {

GateKernel gate_kernel_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return avx512::gate_quantize;
  if (isa >= Isa::avx2) return avx2::gate_quantize;
#elif DFQVIT_ARM
  if (isa != Isa::portable) return neon::gate_quantize;
#endif
  (void)isa;
  return portable::gate_quantize;
}

}  // namespace quant
}  // namespace dfqvit
