// The memory of the operators' results on CPUs, kept for the next ones.
//
// The C library gives large memory back to the kernel when a tensor dies, and the next tensor's costs a page fault for
// each 4 KiB: at batch 32 a quarter of Swin-T's time. So what an operator gave is kept when it dies, a little of it,
// and serves again for a result of about its size.
#pragma once

#include <ATen/core/Tensor.h>

namespace dfqvit {

// A contiguous tensor with anything in it.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace dfqvit
