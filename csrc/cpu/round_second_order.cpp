// dfqvit_cpu::round_second_order: the integers Q, each of `levels`, of a weight W that make trace(O E I E^T) least,
// E = W - scale Q. They are begun by rounding one weight after another, columns outside and rows inside, what is left
// over carried to those that come; then coordinate descent in the same order. Half the derivative by E is O E I.
// Columns go in blocks, so that nearly all of the work is matrix products; within one, what an integer's move does to
// the rest of its column is one row of O, added to `effect` = O times the changes of the column so far.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
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

// The integers that may be taken, ascending. Where they follow one another, rounding half to even finds the nearest; of
// others a table does, by steps of a half: within one the nearest is the same, and of two as near it is the greater.
class Levels {
 public:
  explicit Levels(const at::Tensor& levels) {
    const at::Tensor held = levels.contiguous();
    const int8_t* values = held.const_data_ptr<int8_t>();
    const int64_t count = held.numel();
    least_ = values[0];
    greatest_ = values[count - 1];
    follow_ = values[count - 1] - values[0] == count - 1;
    int64_t at = 0;
    for (int64_t half = 0; half < kHalves; ++half) {
      while (at + 1 < count && values[at] + values[at + 1] <= half - kHalves / 2) ++at;
      nearest_[half] = values[at];
    }
  }

  float nearest(float x) const {
    if (follow_) return std::min(std::max(std::nearbyint(x), least_), greatest_);
    const float half = std::floor(2 * x) + kHalves / 2;
    return nearest_[half >= 0 ? half < kHalves ? static_cast<int>(half) : kHalves - 1 : 0];
  }

 private:
  static constexpr int kHalves = 512;  // from -128 on
  float least_, greatest_;
  bool follow_;
  std::array<int8_t, kHalves> nearest_;
};

// What the weights that are rounded leave to those after them: upper triangular with a diagonal of 1.
struct Carries {
  const float* inputs;   // of the block's own columns, [columns, columns] with Begun::stride
  const float* outputs;  // [rows, rows], or null where rows are independent
};

// A block of columns of the weight to begin with, transposed: each [columns, rows].
struct Begun {
  float* wanted;  // the weight, with what the columns before it left over
  float* rounded;
  float* rests;  // wanted - scale * rounded
  int64_t columns, rows, stride;
};

// Rounds rows [begin, end) of a block: all of them, unless they are independent.
void begin_block(const Begun& block, const float* scale, const Levels& levels, Carries carries, int64_t begin,
                 int64_t end, AddScaled add) {
  std::vector<float> aims(end - begin);  // `wanted` with what the rows before in this column left over
  for (int64_t k = 0; k < block.columns; ++k) {
    float *rounded = block.rounded + k * block.rows, *rests = block.rests + k * block.rows;
    const float* wanted = block.wanted + k * block.rows;
    std::copy(wanted + begin, wanted + end, aims.begin());
    for (int64_t i = begin; i < end; ++i) {
      const float aim = aims[i - begin];
      rounded[i] = levels.nearest(aim / scale[i]);
      rests[i] = wanted[i] - rounded[i] * scale[i];
      if (carries.outputs == nullptr) continue;
      const float* later = carries.outputs + i * block.rows + i + 1;
      add(aims.data() + i + 1 - begin, later, rounded[i] * scale[i] - aim, end - i - 1);
    }
    for (int64_t later = k + 1; later < block.columns; ++later) {
      add(block.wanted + later * block.rows + begin, rests + begin, -carries.inputs[k * block.stride + later],
          end - begin);
    }
  }
}

inline float best(float old, float slope, float curvature, const Levels& levels) {
  return levels.nearest(old + slope / curvature);
}

// Moves the integers of rows [begin, end), where rows are independent.
void move_apart(const Block& block, const float* scale, const Levels& levels, int64_t begin, int64_t end,
                AddScaled add) {
  for (int64_t k = 0; k < block.columns; ++k) {
    float *rounded = block.rounded + k * block.rows, *changes = block.changes + k * block.rows;
    const float *slope = block.slope + k * block.rows, *inputs = block.inputs + k * block.stride;
    for (int64_t i = begin; i < end; ++i) {
      const float moved = best(rounded[i], slope[i], inputs[k] * scale[i], levels);
      changes[i] = (moved - rounded[i]) * scale[i];
      rounded[i] = moved;
    }
    for (int64_t later = k + 1; later < block.columns; ++later) {
      add(block.slope + later * block.rows + begin, changes + begin, -inputs[later], end - begin);
    }
  }
}

// Moves them row after row, each hearing at once of those before it.
void move_in_turn(const Block& block, const float* scale, const Levels& levels, const float* outputs, AddScaled add) {
  std::vector<float> effect(block.rows);
  for (int64_t k = 0; k < block.columns; ++k) {
    float *rounded = block.rounded + k * block.rows, *changes = block.changes + k * block.rows;
    const float *slope = block.slope + k * block.rows, *inputs = block.inputs + k * block.stride;
    std::fill(effect.begin(), effect.end(), 0.0f);
    bool any = false;
    for (int64_t i = 0; i < block.rows; ++i) {
      const float* row = outputs + i * block.rows;
      const float moved = best(rounded[i], slope[i] - inputs[k] * effect[i], row[i] * inputs[k] * scale[i], levels);
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

// The integers to begin with, [columns, rows], of a transposed weight.
at::Tensor begun(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& input_carry,
                 const std::optional<at::Tensor>& output_carry, const Levels& levels) {
  const at::Tensor inner = input_carry.contiguous();
  const at::Tensor outer = output_carry ? output_carry->contiguous() : at::Tensor();
  const int64_t columns = weight.size(0), rows = weight.size(1);
  const AddScaled add = add_scaled();
  at::Tensor wanted = weight.clone(at::MemoryFormat::Contiguous);
  at::Tensor rounded = at::empty_like(wanted), rests = at::empty_like(wanted);
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t size = std::min(kBlock, columns - start), end = start + size;
    const Begun block{wanted.mutable_data_ptr<float>() + start * rows,
                      rounded.mutable_data_ptr<float>() + start * rows,
                      rests.mutable_data_ptr<float>() + start * rows,
                      size,
                      rows,
                      columns};
    const Carries carries{inner.const_data_ptr<float>() + start * columns + start,
                          output_carry ? outer.const_data_ptr<float>() : nullptr};
    if (output_carry) {
      begin_block(block, scale.const_data_ptr<float>(), levels, carries, 0, rows, add);
    } else {
      parallel_ranges(rows, kGrain, [&](int64_t from, int64_t to) {
        begin_block(block, scale.const_data_ptr<float>(), levels, carries, from, to, add);
      });
    }
    if (end < columns) {
      const at::Tensor onwards = inner.slice(0, start, end).slice(1, end).t().contiguous();
      wanted.slice(0, end).sub_(onwards.matmul(rests.slice(0, start, end)));
    }
  }
  return rounded;
}

at::Tensor round_second_order(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& inputs,
                              const std::optional<at::Tensor>& outputs, const at::Tensor& input_carry,
                              const std::optional<at::Tensor>& output_carry, const at::Tensor& levels_of,
                              int64_t sweeps) {
  const c10::impl::ExcludeDispatchKeyGuard as_they_are(c10::autocast_dispatch_keyset);  // the matrix products
  const at::Tensor w = weight.t().contiguous(), moment = inputs.contiguous(), step = scale.contiguous();
  const at::Tensor outer = outputs ? outputs->contiguous() : at::Tensor();
  const int64_t columns = w.size(0), rows = w.size(1);
  const Levels levels(levels_of);
  const AddScaled add = add_scaled();
  at::Tensor rounded = begun(w, step, input_carry, output_carry, levels);
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
        move_in_turn(block, step.const_data_ptr<float>(), levels, outer.const_data_ptr<float>(), add);
      } else {
        parallel_ranges(rows, kGrain, [&](int64_t from, int64_t to) {
          move_apart(block, step.const_data_ptr<float>(), levels, from, to, add);
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
