// For the bindings only (kernels know no torch): the dtypes that compiled operators take.
#pragma once

#include <ATen/Dispatch.h>

#include <string>

// Runs the lambda `...` with scalar_t = float, at::Half or at::BFloat16, whichever `TYPE` says.
#define DFQVIT_DISPATCH_FLOATS(TYPE, NAME, ...)                                                         \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                        \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

namespace dfqvit {

// The dtype that an operator's argument names; see kernels/quant_linear/op.py.
inline at::ScalarType dtype_named(c10::string_view name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  if (name == "uint8") return at::kByte;
  TORCH_CHECK_VALUE(false, "out_dtype was '", std::string(name), "'; it may be float32, bfloat16, float16 or uint8");
}

}  // namespace dfqvit
