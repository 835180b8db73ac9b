// dfqvit_cuda::similarity_range, patch_similarity_entropy and its backward: checks, and memory for the kernels of
// patch_similarity_entropy_kernels.cu. All layers go into each launch, nothing is read back to the host, and memory
// beyond input and output is a few numbers for each row and pair of tiles (for depth > 128 also one float32 gradient).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "dfqvit/build.h"
#include "dfqvit/patch_similarity_entropy_launch.h"
#include "dfqvit/torch_dispatch_cuda.h"

namespace dfqvit {
namespace entropy {
namespace cuda {
namespace {

// The vectors in memory and what normalises them; computed in the constructor, on `stream`.
template <typename T>
struct Units {
  using Element = DeviceType<T>;
  at::Tensor input, inverse, diagonal;
  Sets<Element> sets;
  int64_t count;

  Units(const at::Tensor& features, cudaStream_t stream)
      : input(features.contiguous()),
        inverse(
            at::empty({features.size(0) * features.size(1) * features.size(2)}, features.options().dtype(at::kFloat))),
        diagonal(at::empty_like(inverse)),
        sets{reinterpret_cast<const Element*>(input.const_data_ptr<T>()), inverse.const_data_ptr<float>(),
             diagonal.const_data_ptr<float>(), features.size(2), features.size(3)},
        count(features.size(0) * features.size(1)) {
    const int64_t rows = count * sets.n, most = std::max(blocks(), rows / kRowsOfBlock + 1);
    TORCH_CHECK(most <= std::numeric_limits<int32_t>::max(), "patch_similarity_entropy: ", rows,
                " vectors are more than one launch can have");
    C10_CUDA_CHECK(launch_normalise(sets.x, inverse.mutable_data_ptr<float>(), diagonal.mutable_data_ptr<float>(), rows,
                                    sets.depth, stream));
  }

  int64_t blocks() const { return count * sets.pairs(); }
};

at::Tensor similarity_range(const at::Tensor& features) {
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t layers = features.size(0), batch = features.size(1);
  const auto options = features.options().dtype(at::kFloat);
  if (layers == 0 || batch == 0) return at::zeros({layers, 2}, options);
  at::Tensor result = at::empty({layers, 2}, options);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  DFQVIT_DISPATCH_FLOATS(features.scalar_type(), "similarity_range", [&] {
    const Units<scalar_t> units(features, stream);
    at::Tensor ends = at::empty({units.blocks(), 2}, options);
    C10_CUDA_CHECK(launch_range(units.sets, units.count, layers, ends.mutable_data_ptr<float>(),
                                result.mutable_data_ptr<float>(), stream));
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> patch_similarity_entropy(const at::Tensor& features, const at::Tensor& value_range,
                                                            int64_t points, double bandwidth, int64_t windows) {
  const c10::cuda::CUDAGuard guard(features.device());
  TORCH_CHECK(points <= kMaxPoints, "patch_similarity_entropy: points was ", points, "; CUDA takes up to ", kMaxPoints);
  const int64_t layers = features.size(0), batch = features.size(1), images = batch / windows;
  const auto options = features.options().dtype(at::kFloat);
  at::Tensor entropy = at::empty({layers, images}, features.options());
  at::Tensor density = at::empty({layers, images, points}, options);
  if (layers * images == 0) return {entropy, density};
  const at::Tensor ends = value_range.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  DFQVIT_DISPATCH_FLOATS(features.scalar_type(), "patch_similarity_entropy", [&] {
    using Element = typename Units<scalar_t>::Element;
    const Units<scalar_t> units(features, stream);
    at::Tensor parts = at::empty({units.blocks(), points}, options.dtype(at::kDouble));
    C10_CUDA_CHECK(launch_density(units.sets, units.count, ends.const_data_ptr<float>(), batch, windows,
                                  static_cast<int>(points), static_cast<float>(bandwidth),
                                  parts.mutable_data_ptr<double>(), density.mutable_data_ptr<float>(),
                                  reinterpret_cast<Element*>(entropy.mutable_data_ptr<scalar_t>()), stream));
  });
  return {entropy, density};
}

at::Tensor patch_similarity_entropy_backward(const at::Tensor& grad, const at::Tensor& features,
                                             const at::Tensor& value_range, const at::Tensor& density, double bandwidth,
                                             int64_t windows) {
  const c10::cuda::CUDAGuard guard(features.device());
  at::Tensor result = at::empty_like(features, features.options(), at::MemoryFormat::Contiguous);
  if (result.numel() == 0) return result;
  const int64_t batch = features.size(1), points = density.size(2);
  TORCH_CHECK(points <= kMaxPoints, "patch_similarity_entropy: points was ", points, "; CUDA takes up to ", kMaxPoints);
  const at::Tensor grads = grad.to(at::kFloat).contiguous(), ends = value_range.contiguous();
  const at::Tensor densities = density.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  DFQVIT_DISPATCH_FLOATS(features.scalar_type(), "patch_similarity_entropy_backward", [&] {
    using Element = typename Units<scalar_t>::Element;
    const Units<scalar_t> units(features, stream);
    const bool wide = units.sets.depth > kSharedGradDepth;
    at::Tensor room = at::empty({wide ? features.numel() : 0}, features.options().dtype(at::kFloat));
    C10_CUDA_CHECK(launch_backward(
        units.sets, units.count, ends.const_data_ptr<float>(), densities.const_data_ptr<float>(),
        grads.const_data_ptr<float>(), batch, windows, static_cast<int>(points), static_cast<float>(bandwidth),
        room.mutable_data_ptr<float>(), reinterpret_cast<Element*>(result.mutable_data_ptr<scalar_t>()), stream));
  });
  return result;
}

}  // namespace
}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cuda), CUDA, m) {
  m.impl("similarity_range", &dfqvit::entropy::cuda::similarity_range);
  m.impl("patch_similarity_entropy", &dfqvit::entropy::cuda::patch_similarity_entropy);
  m.impl("patch_similarity_entropy_backward", &dfqvit::entropy::cuda::patch_similarity_entropy_backward);
}
