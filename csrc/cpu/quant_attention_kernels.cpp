// The kernels of quant_attention on every CPU path, and the choice among them. No torch headers.
#include "dfqvit/quant_attention.h"

namespace dfqvit {
namespace quant {

AttentionKernels attention_kernels_for(Isa isa) {
#if DFQVIT_X86
  if (isa == Isa::amx) return {amx::pack, amx::attend};
  if (isa == Isa::avx512 && has_avx512_vnni()) return {avx512::pack, avx512::attend};
#if DFQVIT_AVXVNNI
  if (isa >= Isa::avx2 && has_avx_vnni()) return {avxvnni::pack, avxvnni::attend};
#endif
  if (isa >= Isa::avx2) return {avx2::pack, avx2::attend};
#elif DFQVIT_ARM
  if (isa == Isa::i8mm) return {i8mm::pack, i8mm::attend};
  if (isa == Isa::dotprod) return {dotprod::pack, dotprod::attend};
  if (isa == Isa::neon) return {neon::pack, neon::attend};
#endif
  (void)isa;
  return {portable::pack, portable::attend};
}

}  // namespace quant
}  // namespace dfqvit
