// For the bindings only (kernels know no torch): the dtypes that compiled operators take.
#pragma once

#include <ATen/Dispatch.h>

// Runs the lambda `...` with scalar_t = float, at::Half or at::BFloat16, whichever `TYPE` says.
#define DFQVIT_DISPATCH_FLOATS(TYPE, NAME, ...)                                                         \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                        \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
