// dfqvit_cpu::round_second_order: the integers Q of a weight W that make trace(O E I E^T) least, E = W - scale Q, by
// coordinate descent, columns outside and rows inside. Half the derivative by E is O E I. Columns go in blocks, so that
// nearly all of the work is three matrix products a block; within one, what an integer's move does to the rest of its
// column is one row of O, added to `effect` = O times the changes of the column so far.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"

namespace dfqvit {
namespace {

constexpr int64_t kBlock = 64;   // columns
constexpr int64_t kGrain = 256;  // rows, at least, for a thread, where they are independent

inline __attribute__((always_inline)) void add_scaled_body(float* to, const float* from, float factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}
DFQVIT_TARGET_AVX512 void add_scaled_avx512(float* to, const float* from, float factor, int64_t count) {
  add_scaled_body(to, from, factor, count);
}
DFQVIT_TARGET_AVX2 void add_scaled_avx2(float* to, const float* from, float factor, int64_t count) {
  add_scaled_body(to, from, factor, count);
}
void add_scaled_portable(float* to, const float* from, float factor, int64_t count) {
  add_scaled_body(to, from, factor, count);
}

using AddScaled = void (*)(float* to, const float* from, float factor, int64_t count);

AddScaled add_scaled() {
  return version_for(active_isa(), add_scaled_avx512, add_scaled_avx2, add_scaled_portable);
}

// A block of columns of the weight, transposed: each [columns, rows].
struct Block {
  float* rounded;
  float* slope;         // half the derivative, negative: where the weight should go
  float* changes;       // of the weight, by this sweep
  const float* inputs;  // of the block's own columns, [columns, columns] with `stride`
  int64_t columns, rows, stride;
};

struct Limits {
  float least, greatest;
};

inline float best(float old, float slope, float curvature, Limits limits) {
  return std::min(std::max(std::nearbyint(old + slope / curvature), limits.least), limits.greatest);
}

// Moves the integers of rows [begin, end), where rows are independent.
void move_apart(const Block& block, const float* scale, Limits limits, int64_t begin, int64_t end, AddScaled add) {
  for (int64_t k = 0; k < block.columns; ++k) {
    float *rounded = block.rounded + k * block.rows, *changes = block.changes + k * block.rows;
    const float *slope = block.slope + k * block.rows, *inputs = block.inputs + k * block.stride;
    for (int64_t i = begin; i < end; ++i) {
      const float moved = best(rounded[i], slope[i], inputs[k] * scale[i], limits);
      changes[i] = (moved - rounded[i]) * scale[i];
      rounded[i] = moved;
    }
    for (int64_t later = k + 1; later < block.columns; ++later) {
      add(block.slope + later * block.rows + begin, changes + begin, -inputs[later], end - begin);
    }
  }
}

// Moves them row after row, each hearing at once of those before it.
void move_in_turn(const Block& block, const float* scale, Limits limits, const float* outputs, AddScaled add) {
  std::vector<float> effect(block.rows);
  for (int64_t k = 0; k < block.columns; ++k) {
    float *rounded = block.rounded + k * block.rows, *changes = block.changes + k * block.rows;
    const float *slope = block.slope + k * block.rows, *inputs = block.inputs + k * block.stride;
    std::fill(effect.begin(), effect.end(), 0.0f);
    bool any = false;
    for (int64_t i = 0; i < block.rows; ++i) {
      const float* row = outputs + i * block.rows;
      const float moved = best(rounded[i], slope[i] - inputs[k] * effect[i], row[i] * inputs[k] * scale[i], limits);
      changes[i] = (moved - rounded[i]) * scale[i];
      if (moved == rounded[i]) continue;
      any = true;
      rounded[i] = moved;
      add(effect.data(), row, changes[i], block.rows);
    }
    for (int64_t later = k + 1; any && later < block.columns; ++later) {
      add(block.slope + later * block.rows, effect.data(), -inputs[later], block.rows);
    }
  }
}

at::Tensor round_second_order(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& inputs,
                              const std::optional<at::Tensor>& outputs, int64_t bits, int64_t sweeps) {
  const at::Tensor w = weight.t().contiguous(), moment = inputs.contiguous(), step = scale.contiguous();
  const at::Tensor outer = outputs ? outputs->contiguous() : at::Tensor();
  const int64_t columns = w.size(0), rows = w.size(1);
  const float half = static_cast<float>(int64_t{1} << (bits - 1));
  const Limits limits{-half, half - 1};
  const AddScaled add = add_scaled();
  at::Tensor rounded = w.div(step).round_().clamp_(limits.least, limits.greatest);
  at::Tensor changes = at::empty_like(w);
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    bool moved = false;
    at::Tensor slope = moment.matmul(w.sub(rounded.mul(step)));  // both transposed; the moments are symmetric
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t size = std::min(kBlock, columns - start), end = start + size;
      at::Tensor mine = changes.slice(0, start, end);
      at::Tensor inner = outputs ? slope.slice(0, start, end).matmul(outer) : slope.slice(0, start, end);
      const Block block{rounded.mutable_data_ptr<float>() + start * rows,
                        inner.mutable_data_ptr<float>(),
                        mine.mutable_data_ptr<float>(),
                        moment.const_data_ptr<float>() + start * columns + start,
                        size,
                        rows,
                        columns};
      if (outputs) {
        move_in_turn(block, step.const_data_ptr<float>(), limits, outer.const_data_ptr<float>(), add);
      } else {
        parallel_ranges(rows, kGrain, [&](int64_t from, int64_t to) {
          move_apart(block, step.const_data_ptr<float>(), limits, from, to, add);
        });
      }
      if (!mine.any().item<bool>()) continue;
      moved = true;
      if (end < columns) slope.slice(0, end).sub_(moment.slice(0, end).slice(1, start, end).matmul(mine));
    }
    if (!moved) break;
  }
  return rounded.t().contiguous().to(at::kChar);
}

}  // namespace
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("round_second_order", &dfqvit::round_second_order);
}
