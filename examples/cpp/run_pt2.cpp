// A quantized model in C++, without Python: loads dfqvit's operators and a .pt2 that AOTInductor made, and runs it.
//
//     run_pt2 libdfqvit_ops.so model.pt2 channels height width [batch]
//
// Prints the class and the greatest logit of each image of a fixed pattern. docs/inference.md tells how to make the
// .pt2 and how to build this.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc < 6) return std::fprintf(stderr, "usage: %s OPERATORS MODEL CHANNELS HEIGHT WIDTH [BATCH]\n", argv[0]), 2;
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const int64_t batch = argc > 6 ? std::atoll(argv[6]) : 1;
  const std::vector<int64_t> shape{batch, std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5])};
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor images = at::arange(shape[0] * shape[1] * shape[2] * shape[3]).remainder(97).div(48.5f).sub(1.0f);
  const at::Tensor logits = model.run({images.view(shape)})[0];
  const auto [values, classes] = logits.max(1);
  for (int64_t i = 0; i < batch; ++i) {
    std::printf("%lld %.6f\n", static_cast<long long>(classes[i].item<int64_t>()), values[i].item<double>());
  }
  return 0;
}
