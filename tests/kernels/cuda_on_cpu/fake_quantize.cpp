// The CUDA kernel of fake_quantize on a CPU, for tests/kernels/test_fake_quantize_cuda.py: csrc/include/dfqvit/
// fake_quantize.cuh itself, with the headers of this folder in place of CUDA's.
#include "dfqvit/fake_quantize.cuh"

using namespace dfqvit;

namespace {

template <typename T>
void run(int64_t blocks, const void* grad, const void* x, void* y, const float* scale, const float* zero, int64_t n,
         int64_t channels, int64_t inner, float least, float greatest) {
  const auto body = [&](auto kernel) {
    emulator::launch(static_cast<unsigned>(blocks), kFakeThreads, [&] {
      kernel(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(y), scale, zero, n, channels, inner,
             least, greatest);
    });
  };
  grad ? body(fake_quantize_kernel<T, true>) : body(fake_quantize_kernel<T, false>);
}

}  // namespace

extern "C" {

int64_t blocks(int64_t n) {
  return fake_quantize_blocks(n);
}

// type: 0 float, 1 bfloat16, 2 float16. grad is null for the forward.
void fake_quantize(int64_t blocks, int type, const void* grad, const void* x, void* y, const float* scale,
                   const float* zero, int64_t n, int64_t channels, int64_t inner, float least, float greatest) {
  if (type == 0) return run<float>(blocks, grad, x, y, scale, zero, n, channels, inner, least, greatest);
  if (type == 1) return run<__nv_bfloat16>(blocks, grad, x, y, scale, zero, n, channels, inner, least, greatest);
  return run<__half>(blocks, grad, x, y, scale, zero, n, channels, inner, least, greatest);
}
}
