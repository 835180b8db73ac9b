// A transformer block of the integer runtime in one call: the chain of operators of dfqvit/chain.py, with the same
// kernels.
//
//     x -> LayerNorm + quantize -> qkv -> attention -> proj + x -> LayerNorm + quantize -> fc1 -> fc2 + residual
//
// What lies between the operators stays in the caches of the thread that computes it, and few threads wait for others.
#pragma once

#include "dfqvit/layers.h"

namespace dfqvit {
namespace quant {

class Block {
 public:
  Block(NormLayer norm1, LinearLayer qkv, AttentionLayer attention, LinearLayer proj, NormLayer norm2, LinearLayer fc1,
        LinearLayer fc2);

  // float32 [B, T, C], contiguous, to the same.
  at::Tensor run(const at::Tensor& x) const;

 private:
  struct Stages;

  NormLayer norm1_, norm2_;
  LinearLayer qkv_, proj_, fc1_, fc2_;
  AttentionLayer attention_;
};

}  // namespace quant
}  // namespace dfqvit
