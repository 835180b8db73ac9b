// The CUDA kernel of quant_attention on a CPU, for tests/kernels/test_quant_attention_cuda.py.
#include "dfqvit/quant_attention.cuh"

using namespace dfqvit::quant;
using namespace dfqvit::quant::attention;

namespace {

template <int kDepth, bool kAddends>
void run(const Heads& p, unsigned blocks) {
  std::memset(tile::memory, 0xAB, sizeof tile::memory);
  tile::shared_size = shared_bytes<kDepth>(p.tokens);
  emulator::launch(blocks, 32 * warps_for<kDepth, kAddends>(p.tokens),
                   [&] { attend<kDepth, kTilesOfWarp<kDepth, kAddends>, kAddends>(p, tile::memory); });
}
template <int kDepth>
void run(const Heads& p, unsigned blocks) {
  p.bias || p.mask ? run<kDepth, true>(p, blocks) : run<kDepth, false>(p, blocks);
}

}  // namespace

extern "C" void attention(const uint8_t* qkv, const int32_t* index, const float* bias, const float* mask,
                          const float* in_scale, const float* in_zero, float scale, const float* out_scale,
                          const float* out_zero, float greatest, void* out, int heads, int tokens, int depth,
                          int windows, int batch, const float* head_scale) {
  const Heads p{qkv,      index,    bias, mask,  in_scale, in_zero, scale,  out_scale,
                out_zero, greatest, out,  heads, tokens,   depth,   windows, head_scale};
  const unsigned blocks = batch * windows * heads;
  depth <= 32   ? run<32>(p, blocks)
  : depth <= 64 ? run<64>(p, blocks)
  : depth <= 96 ? run<96>(p, blocks)
                : run<128>(p, blocks);
}
