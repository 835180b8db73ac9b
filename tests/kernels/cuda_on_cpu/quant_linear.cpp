// The CUDA kernels of quant_linear on a CPU, for tests/kernels/test_quant_linear_cuda.py: csrc/include/dfqvit/
// quant_linear.cuh itself, with the headers of this folder in place of CUDA's.
#include "dfqvit/quant_linear.cuh"

#include "dfqvit/quant_linear_tiles.cuh"

using namespace dfqvit::quant::tile;

namespace {

template <typename S, int kBits>
void multiply(unsigned blocks, const Operands& p, const Epilogue& e) {
  std::memset(memory, 0xAB, sizeof memory);
  std::memset(shown, 0xAB, sizeof shown);
  shared_size = S::kSharedBytes;
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  emulator::launch(blocks, S::kThreads, [&] { multiply_kernel<S, kBits>(p, e, tiles); });
}

void multiply_tiles(unsigned blocks, const Operands& p, const Epilogue& e) {
  using S = GroupOfTiles;
  std::memset(memory, 0xAB, sizeof memory);
  std::memset(shown, 0xAB, sizeof shown);
  shared_size = S::kSharedBytes;
  tile_barriers.clear();
  const TensorMap a = described(p.a, p.a_bytes, p.rows), b = described(p.b, p.b_bytes, p.outputs);
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  emulator::launch(blocks, S::kThreads, [&] { multiply_tiles_kernel<S>(a, b, p, e, tiles); });
  for (const auto& [address, barrier] : tile_barriers) {
    if (!barrier.copies.empty()) std::abort();  // nobody waited for them
  }
}

template <typename S>
void multiply(int bits, unsigned blocks, const Operands& p, const Epilogue& e) {
  switch (bits) {
    case 2:
      return multiply<S, 2>(blocks, p, e);
    case 3:
      return multiply<S, 3>(blocks, p, e);
    case 4:
      return multiply<S, 4>(blocks, p, e);
    case 5:
      return multiply<S, 5>(blocks, p, e);
    case 6:
      return multiply<S, 6>(blocks, p, e);
    case 7:
      return multiply<S, 7>(blocks, p, e);
    default:
      return multiply<S, 8>(blocks, p, e);
  }
}

template <typename T>
void quantize(unsigned blocks, const void* x, int rows, int columns, const Quantizer& q, uint8_t* out, int64_t stride) {
  emulator::launch(blocks, kRowThreads,
                   [&] { quantize_rows_kernel<T>(static_cast<const T*>(x), rows, columns, q, out, stride); });
}

}  // namespace

extern "C" {

void quantize_rows(int blocks, int type, const void* x, int rows, int columns, const float* scale, int step,
                   const float* zero, float least, float greatest, uint8_t* out, int64_t stride) {
  const Quantizer q{scale, step, zero, least, greatest};
  switch (static_cast<Type>(type)) {
    case Type::f32:
      return quantize<float>(blocks, x, rows, columns, q, out, stride);
    case Type::bf16:
      return quantize<__nv_bfloat16>(blocks, x, rows, columns, q, out, stride);
    default:
      return quantize<__half>(blocks, x, rows, columns, q, out, stride);
  }
}

void sums(const uint8_t* weight, int64_t row_bytes, int bits, int outputs, int depth, int32_t* sums) {
  emulator::launch((outputs + kRowsAtOnce - 1) / kRowsAtOnce, kRowThreads,
                   [&] { sums_kernel(weight, row_bytes, bits, outputs, depth, sums); });
}

void unpack(int bits, const uint8_t* weight, int64_t row_bytes, int64_t rows, uint8_t* out) {
  const int64_t chunks = rows * (row_bytes / (2 * bits));
  const auto run = [&](auto kernel) {
    emulator::launch((chunks + kRowThreads - 1) / kRowThreads, kRowThreads,
                     [&] { kernel(weight, row_bytes, chunks, out); });
  };
  switch (bits) {
    case 2:
      return run(unpack_kernel<2>);
    case 3:
      return run(unpack_kernel<3>);
    case 4:
      return run(unpack_kernel<4>);
    case 5:
      return run(unpack_kernel<5>);
    case 6:
      return run(unpack_kernel<6>);
    default:
      return run(unpack_kernel<7>);
  }
}

// shape: 0 Small, 1 Large, 2 Group, 3 GroupOfTiles, for weights of 8 bits; others go by Group then.
void product(int shape, int blocks, int bits, const uint8_t* a, int a_bytes, const uint8_t* b, int b_bytes, int rows,
             int outputs, int depth, const float* x_scale, const float* x_zero, const float* w_scale,
             const int32_t* w_sums, const float* bias, const float* acm, int tokens, int activation,
             const void* residual, int residual_type, const float* out_scale, const float* out_zero, float out_greatest,
             void* out, int type, int whole) {
  const Operands p{a, a_bytes, b, b_bytes, rows, outputs, depth};
  Epilogue e{x_scale,
             x_zero,
             w_scale,
             w_sums,
             bias,
             acm,
             tokens,
             static_cast<Activation>(activation),
             residual,
             static_cast<Type>(residual_type),
             out_scale,
             out_zero,
             out_greatest,
             out,
             static_cast<Type>(type),
             whole != 0};
  prepare(e);
  switch (shape) {
    case 0:
      return multiply<Small>(bits, blocks, p, e);
    case 1:
      return multiply<Large>(bits, blocks, p, e);
    case 2:
      return multiply<Group>(bits, blocks, p, e);
    default:
      return bits == 8 ? multiply_tiles(blocks, p, e) : multiply<Group>(bits, blocks, p, e);
  }
}

// A [64, 32] and B [128, 32] as they stand in `arrays` (two of 128-byte rows, 8 and 16 KB, copied to shared memory), at
// byte `start` of a row; their product to sums [128 threads, 64], which start from 1. Leaves out what is not asked for.
void one_product(const uint8_t* arrays, int start, int show, int fence, int early, int32_t* sums) {
  shared_size = 24 << 10;
  std::memset(shown, 0xAB, sizeof shown);
  emulator::launch(1, kGroup, [&] {
    for (uint32_t at = 16 * threadIdx.x; at < shared_size; at += 16 * kGroup) {
      uint32_t words[4];
      std::memcpy(words, arrays + at, 16);
      store_chunk(at, words);
    }
    if (show) show_to_async_proxy();
    __syncthreads();
    int32_t sum[16][4];
    std::fill(sum[0], sum[0] + 64, 1);
    if (fence) group_fence();
    group_multiply(sum, operand_descriptor(start), operand_descriptor((8 << 10) + start));
    group_commit();
    if (early) std::memcpy(sums + 64 * threadIdx.x, sum, sizeof sum);
    group_wait(sum);
    if (!early) std::memcpy(sums + 64 * threadIdx.x, sum, sizeof sum);
  });
}

}  // extern "C"

namespace {

// The greatest number of the 8 rows of an `ldmatrix` that share a bank, over all rows and chunks.
template <typename S>
int matrix_conflicts() {
  int worst = 0;
  for (int row = 0; row < S::kM; row += 8) {
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      int used[8] = {};
      for (int i = 0; i < 8; ++i) worst = std::max(worst, ++used[shared_offset<S>(row + i, chunk) / 16 % 8]);
    }
  }
  return worst;
}

// The greatest number of words that meet in a bank when half a warp stores its pairs of sums in a panel.
template <typename S>
int panel_conflicts() {
  int used[32] = {}, worst = 0;
  for (int lane = 0; lane < 16; ++lane) {
    const Place at = summed(lane, 0);
    for (int i = 0; i < 2; ++i) worst = std::max(worst, ++used[(at.row * S::kPanelPitch + at.column + i) % 32]);
  }
  return worst;
}

template <typename S>
int conflicts() {
  return std::max(matrix_conflicts<S>(), panel_conflicts<S>());
}

}  // namespace

extern "C" {

int conflicts(int shape) {
  return shape == 0   ? conflicts<Small>()
         : shape == 1 ? conflicts<Large>()
         : shape == 2 ? conflicts<Group>()
                      : conflicts<GroupOfTiles>();
}
}
