// The CPU kernels of quant_attention for every path. Both products are quant_linear's (quant_linear_multiply.h): keys
// and values are packed like an 8-bit weight, so that K^T and V are its blocks. Nothing of size [N, N] is ever in
// memory: the scores of a strip of queries are. No torch headers.
#pragma once

#include <limits>

#include "dfqvit/quant_linear.h"
#include "dfqvit/simd_bytes.h"

namespace dfqvit {
namespace quant {

constexpr int64_t kStripRows = 32;      // queries whose scores are in the first cache at once, at most
constexpr int32_t kNoKey = -(1 << 30);  // the sums of keys that do not exist begin here: never the greatest

// What all heads share.
struct Heads {
  int64_t tokens, depth;  // N of a window and D of a head
  float factor;           // softmax scale * q_scale * k_scale
  int32_t q_zero;
  float v_scale, v_zero;  // v_zero: of V as signed bytes
  Quantizer out;          // where the result is bytes
  int64_t out_stride;     // elements from token to token
};

// Where the integers of one head of one window stand.
struct Source {
  const uint8_t* q;                          // of token 0
  int64_t stride, third;                     // bytes from token to token, and from q to k to v
  const int32_t* index;                      // the tokens of the window, or null for 0, 1, 2, ...
  const uint8_t* end;                        // of the memory that may be read
  bool in_place(const Heads& heads) const {  // whether q can be multiplied where it stands
    return index == nullptr && q + (heads.tokens - 1) * stride + chunks_of(heads.depth) * kDepth <= end;
  }
};

// A head as the products want it: queries in rows, K and V in the blocks of an 8-bit weight.
struct Packed {
  uint8_t* queries;  // [N, chunks of D * 64], or null: they are read in place
  Weight keys, values;
  int32_t* key_starts;    // (the path's kOffset - q_zero) * sum_d k, for each key, padded to a block
  int32_t* value_starts;  // kOffset * sum over the tokens of v, for each channel; padded to a block
};

// One head of one window, packed.
struct Head {
  const uint8_t* queries;  // [N, D], readable to whole chunks
  int64_t query_stride;
  Packed packed;
  const float *bias, *mask;  // [N, N] or null
  const int32_t* index;      // as in Source
  uint8_t* out_bytes;        // row 0 of the image, at this head's first column; one of the two is null
  float* out_floats;
};

// Scratch of one thread for a strip of queries.
struct Strip {
  int32_t* scores;   // [blocks of N][kRows of the path][16], after kHeadroom
  uint8_t* steps;    // [kStripRows, chunks of N * 64]
  int8_t* ones;      // [chunks of N * 64]: 1 for each key
  int32_t* results;  // [blocks of D][kRows of the path][16]
};

// The memory of one thread that attends, laid out in `bytes(heads)` bytes from a multiple of 64 on.
struct Workspace {
  Packed packed;
  Strip strip;

  static int64_t bytes(const Heads& heads) {
    Workspace nowhere;
    return nowhere.lay_out(heads, nullptr);
  }
  Workspace(const Heads& heads, uint8_t* memory) {
    const int64_t chunks = chunks_of(heads.tokens);
    lay_out(heads, memory);
    for (int64_t block = 0; block < blocks_of(heads.depth); ++block) {  // tokens beyond the last count for nothing
      std::memset(const_cast<uint8_t*>(packed.values.values(block)), 0, chunks * kChunk);
    }
    std::memset(strip.steps, 0, kStripRows * chunks * kDepth);
    for (int64_t t = 0; t < chunks * kDepth; ++t) strip.ones[t] = t < heads.tokens;
  }

 private:
  Workspace() = default;
  int64_t lay_out(const Heads& heads, uint8_t* memory) {
    const int64_t tokens = heads.tokens, key_chunks = chunks_of(heads.depth), value_chunks = chunks_of(tokens);
    const int64_t key_blocks = blocks_of(tokens), value_blocks = blocks_of(heads.depth);
    const int64_t key_stride = kOutputs + key_chunks * kChunk / 4, value_stride = kOutputs + value_chunks * kChunk / 4;
    uint8_t* const begin = memory;
    const auto take = [&](int64_t count) {
      uint8_t* place = memory;
      memory += (count + 63) / 64 * 64;
      return place;
    };
    const auto integers = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(4 * count)); };
    packed.queries = take(tokens * key_chunks * kDepth);
    packed.keys = {integers(key_blocks * key_stride), key_stride, heads.depth, key_chunks, 8};
    packed.values = {integers(value_blocks * value_stride), value_stride, tokens, value_chunks, 8};
    packed.key_starts = integers(key_blocks * kOutputs);
    packed.value_starts = integers(value_blocks * kOutputs);
    strip.scores = integers(kHeadroom + kStripRows * key_blocks * kOutputs) + kHeadroom;
    strip.steps = take(kStripRows * value_chunks * kDepth);
    strip.ones = reinterpret_cast<int8_t*>(take(value_chunks * kDepth));
    strip.results = integers(kStripRows * value_blocks * kOutputs);
    return memory - begin;
  }
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/quant_attention_body.h"
#define DFQVIT_WITH_PRODUCTS
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// The entry points of one path; quant_attention_body.h says what each does.
struct AttentionKernels {
  void (*pack)(const Source&, const Heads&, const Packed&);
  void (*attend)(const Head&, const Heads&, int64_t begin, int64_t end, const Strip&);
};

// Defined in csrc/cpu/quant_attention_kernels.cpp, so that the paths are compiled there alone.
AttentionKernels attention_kernels_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
