// The CUDA kernels of patch_similarity_entropy on a CPU, for tests/kernels/test_patch_similarity_entropy_cuda.py: csrc/
// include/dfqvit/patch_similarity_entropy.cuh itself, with the headers of this folder in place of CUDA's. The launches
// are those of csrc/cuda/patch_similarity_entropy.cu.
#include "dfqvit/patch_similarity_entropy.cuh"

namespace dfqvit {
namespace entropy {
namespace cuda {

constexpr int kSharedLimit = 227 << 10;  // bytes that a block can have
alignas(128) float shared[kSharedLimit / 4];

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit

using namespace dfqvit::entropy::cuda;

namespace {

// With shared memory that holds rubbish; aborts where the kernel wrote beyond what it asked for.
template <typename Body>
void launch(int64_t blocks, int threads, int64_t bytes, Body body) {
  if (bytes > kSharedLimit) std::abort();
  std::memset(shared, 0xAB, sizeof shared);
  emulator::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), body);
  const auto* memory = reinterpret_cast<const uint8_t*>(shared);
  if (std::any_of(memory + bytes, memory + kSharedLimit, [](uint8_t byte) { return byte != 0xAB; })) std::abort();
}

template <typename T>
struct Units {
  std::vector<float> inverse, diagonal;
  Sets<T> sets;
  int64_t blocks;

  Units(const void* x, int64_t count, int64_t n, int64_t depth)
      : inverse(count * n, NAN), diagonal(count * n, NAN), sets{static_cast<const T*>(x), nullptr, nullptr, n, depth} {
    launch((count * n + kRowsOfBlock - 1) / kRowsOfBlock, kRowThreads, 0,
           [&] { normalise_kernel(sets.x, inverse.data(), diagonal.data(), count * n, depth); });
    sets.inverse = inverse.data(), sets.diagonal = diagonal.data();
    blocks = count * sets.pairs();
  }
};

template <typename T>
void range(const void* x, int64_t layers, int64_t batch, int64_t n, int64_t depth, float* result) {
  const Units<T> units(x, layers * batch, n, depth);
  std::vector<float> ends(2 * units.blocks, NAN);
  launch(units.blocks, kThreads, tile_shared_bytes(), [&] { range_kernel(units.sets, ends.data()); });
  launch(layers, 32, 0, [&] { finish_range_kernel(ends.data(), batch * units.sets.pairs(), result); });
}

template <typename T>
void forward(const void* x, const float* ends, int64_t layers, int64_t batch, int64_t n, int64_t depth, int points,
             float bandwidth, int64_t windows, float* density, void* entropy) {
  const Units<T> units(x, layers * batch, n, depth);
  const int64_t images = batch / windows;
  std::vector<double> parts(units.blocks * points, NAN);
  launch(units.blocks, kThreads, tile_shared_bytes(),
         [&] { density_kernel(units.sets, ends, batch, points, bandwidth, parts.data()); });
  launch(layers * images, kRowThreads, 0, [&] {
    finish_density_kernel(parts.data(), units.sets.diagonal, ends, n, units.sets.pairs(), windows, images, points,
                          bandwidth, density, static_cast<T*>(entropy));
  });
}

template <typename T>
void backward(const void* x, const float* ends, const float* density, const float* grad, int64_t layers, int64_t batch,
              int64_t n, int64_t depth, int points, float bandwidth, int64_t windows, void* out) {
  const Units<T> units(x, layers * batch, n, depth);
  std::vector<float> room(depth <= kSharedGradDepth ? 0 : layers * batch * n * depth, NAN);
  launch(layers * batch * units.sets.tiles(), kThreads, backward_shared_bytes(points, depth), [&] {
    backward_kernel(units.sets, ends, density, grad, batch, windows, points, bandwidth, room.data(),
                    static_cast<T*>(out));
  });
}

}  // namespace

// type: 0 float, 1 bfloat16, 2 float16.
#define DFQVIT_FOR(type, call) \
  if (type == 0) {             \
    using T = float;           \
    call;                      \
  } else if (type == 1) {      \
    using T = __nv_bfloat16;   \
    call;                      \
  } else {                     \
    using T = __half;          \
    call;                      \
  }

extern "C" {

void similarity_range(int type, const void* x, int64_t layers, int64_t batch, int64_t n, int64_t depth, float* result) {
  DFQVIT_FOR(type, range<T>(x, layers, batch, n, depth, result))
}

void entropy(int type, const void* x, const float* ends, int64_t layers, int64_t batch, int64_t n, int64_t depth,
             int points, float bandwidth, int64_t windows, float* density, void* result) {
  DFQVIT_FOR(type, forward<T>(x, ends, layers, batch, n, depth, points, bandwidth, windows, density, result))
}

void entropy_backward(int type, const void* x, const float* ends, const float* density, const float* grad,
                      int64_t layers, int64_t batch, int64_t n, int64_t depth, int points, float bandwidth,
                      int64_t windows, void* out) {
  DFQVIT_FOR(type, backward<T>(x, ends, density, grad, layers, batch, n, depth, points, bandwidth, windows, out))
}
}
