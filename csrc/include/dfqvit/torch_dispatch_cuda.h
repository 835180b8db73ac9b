// For the bindings of CUDA kernels only: the dtypes that compiled operators take, as the kernels know them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dfqvit/torch_dispatch.h"

namespace dfqvit {

// CUDA's own type for torch's.
template <typename T>
struct DeviceTypeOf {
  using type = T;
};
template <>
struct DeviceTypeOf<at::Half> {
  using type = __half;
};
template <>
struct DeviceTypeOf<at::BFloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using DeviceType = typename DeviceTypeOf<T>::type;

}  // namespace dfqvit
