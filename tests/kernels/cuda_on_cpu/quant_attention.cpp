// The CUDA kernel of quant_attention on a CPU, for tests/kernels/test_quant_attention_cuda.py.
#include "dfqvit/quant_attention.cuh"

using namespace dfqvit::quant;
using namespace dfqvit::quant::attention;

namespace {

constexpr int kShared = 228 << 10;  // of a multiprocessor

template <int kDepth, int kKept, bool kAddends>
void run(const Heads& p, unsigned blocks) {
  const int warps = warps_for<kDepth, kKept>(p.tokens, kShared);
  std::memset(tile::memory, 0xAB, sizeof tile::memory);
  tile::shared_size = shared_bytes<kDepth, kKept>(p.tokens, warps);
  emulator::launch(blocks, 32 * warps, [&] { attend<kDepth, kKept, kAddends>(p, tile::memory); });
}

}  // namespace

extern "C" void attention(const uint8_t* qkv, const int32_t* index, const float* bias, const float* mask,
                          const float* in_scale, const float* in_zero, float scale, const float* out_scale,
                          const float* out_zero, float greatest, void* out, int heads, int tokens, int depth,
                          int windows, int batch, const float* head_scale) {
  const Heads p{qkv,      index,    bias, mask,  in_scale, in_zero, scale,   out_scale,
                out_zero, greatest, out,  heads, tokens,   depth,   windows, head_scale};
  const unsigned blocks = batch * windows * heads;
  with_shape(p, [&](auto depth, auto kept) {
    constexpr int kDepth = decltype(depth)::value, kKept = decltype(kept)::value;
    p.bias || p.mask ? run<kDepth, kKept, true>(p, blocks) : run<kDepth, kKept, false>(p, blocks);
  });
}

// Warps of a block, blocks of a multiprocessor and bytes of one, for this many tokens of `depth` channels.
extern "C" void layout(int tokens, int depth, int shared, int* warps, int* blocks, int* bytes) {
  Heads p{};
  p.tokens = tokens, p.depth = depth;
  with_shape(p, [&](auto depth, auto kept) {
    constexpr int kDepth = decltype(depth)::value, kKept = decltype(kept)::value;
    *warps = warps_for<kDepth, kKept>(tokens, shared);
    *blocks = blocks_together<kDepth, kKept>(tokens, *warps, shared);
    *bytes = shared_bytes<kDepth, kKept>(tokens, *warps);
  });
}
