// The stages of a block on some rows, and the division of rows among threads: see dfqvit/quant_block.h.
#include "dfqvit/quant_block.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "dfqvit/build.h"
#include "dfqvit/parallel.h"
#include "dfqvit/quantize_heads.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

constexpr int64_t kRowsTogether = 400;  // of whole images that a thread takes through all stages, about
constexpr int64_t kMostTogether = 416;  // that go through the layers before or after attention at once
constexpr int64_t kWideTogether =
    3 << 17;  // bytes of floats between layers that do, about: they stay in the second cache

// Parts of the rows, of which a thread takes that which it had last, if nobody else has: its caches still hold the
// rows, from one stage to the next and from block to block.
class Parts {
 public:
  explicit Parts(int64_t count) : taken_(count) {}
  // One that nobody has; there must be one.
  int64_t take() {
    static thread_local int64_t last = 0;
    const int64_t count = static_cast<int64_t>(taken_.size());
    while (taken_[last %= count].exchange(true)) ++last;
    return last;
  }

 private:
  std::vector<std::atomic<bool>> taken_;
};

// How the last `tokens` of every image are turned: sines and cosines of the first of them, `stride` floats from head to
// head, 0 where all share one.
struct Turns {
  const float* sines = nullptr;
  int64_t tokens = 0, stride = 0;
};

Turns turns_of(const at::Tensor& rope, int64_t image, int64_t heads, int64_t channels) {
  const int64_t width = 2 * (channels / heads);
  const bool each = rope.dim() == 3;
  TORCH_CHECK_VALUE((rope.dim() == 2 || (each && rope.size(0) == heads)) && rope.size(-1) == width &&
                        rope.size(-2) <= image && width % 4 == 0,
                    "rope had shape ", rope.sizes(), "; it must be [R, ", width, "] or [", heads, ", R, ", width,
                    "] with R up to ", image, " tokens, and heads of an even depth");
  return {rope.const_data_ptr<float>(), rope.size(-2), each ? rope.size(-2) * width : 0};
}

}  // namespace

// The stages for the rows of some images: x and out at the first of them; what all rows have between the stages in
// `shared`, of `shared_bytes`, and what a thread has while it computes in memory of its own, of `own_bytes`.
struct Block::Stages {
  const Block& block;
  const float* x;
  float* out;
  int64_t image, rows;  // of an image, and of all
  int64_t together;     // rows that go through the layers before or after attention at once
  const Weights& weights;
  uint8_t *between, *attended;  // integers of q, k and v, and what attention makes of them
  Turns turns;
  Heads heads;
  Kernels kernels;
  AttentionKernels attention;
  NormKernels norms;
  HeadsKernel to_heads;
  GateKernel to_hidden;

  static int64_t between_bytes(const Block& b, int64_t rows) { return aligned(rows * b.qkv_.out_features + kDepth); }
  static int64_t shared_bytes(const Block& b, int64_t rows) {
    return between_bytes(b, rows) + aligned(rows * b.proj_.stride());
  }

  Stages(const Block& b, const Weights& weights, const float* x, float* out, int64_t image, int64_t rows,
         const Turns& turns, uint8_t* shared)
      : block(b),
        x(x),
        out(out),
        image(image),
        rows(rows),
        together(most_together(b, rows)),
        weights(weights),
        between(shared),
        attended(shared + between_bytes(b, rows)),
        turns(turns) {
    heads = b.attention_.heads_of(image, b.proj_.in_features);
    heads.out_stride = b.proj_.stride();
    const bool ordinary = b.norm1_.ordinary && b.norm2_.ordinary && b.qkv_.ordinary && b.proj_.ordinary &&
                          b.fc1_.ordinary && b.fc2_.ordinary && b.attention_.ordinary && b.ordinary_heads() &&
                          (!b.gate_ || b.gate_->ordinary);
    const Isa isa = ordinary ? active_isa() : Isa::portable;
    kernels = kernels_for(isa);
    attention = attention_kernels_for(isa);
    norms = norm_kernels_for(isa);
    to_heads = heads_kernel_for(isa);
    to_hidden = gate_kernel_for(isa);
  }

  // A thread's memory.
  struct Own {
    uint8_t *normed, *hidden, *scratch;
    float* floats;  // what a layer gives where more is to come before it is rounded or added
  };
  int64_t own_bytes() const { return normed_bytes() + hidden_bytes() + float_bytes() + scratch_bytes(); }
  Own own(uint8_t* memory) const {
    uint8_t *hidden = memory + normed_bytes(), *floats = hidden + hidden_bytes();
    return {memory, hidden, floats + float_bytes(), reinterpret_cast<float*>(floats)};
  }

  // Rows begin to end of everything before attention.
  void before(int64_t begin, int64_t end, const Own& own) const {
    const LinearLayer& qkv = block.qkv_;
    each_part(begin, end, [&](int64_t first, int64_t last) {
      to_bytes(block.norm1_, qkv, x, first, last, own);
      if (!block.wide()) {
        apply(qkv, weights[0], own.normed, first, last, nullptr, between, qkv.out_features, own.scratch);
        return;
      }
      apply(qkv, weights[0], own.normed, 0, last - first, nullptr, own.floats, qkv.out_features, own.scratch);
      const int64_t width = qkv.out_features / 3, depth = heads.depth;
      bool finite = true;
      for (int64_t row = first; row < last; ++row) {
        const int64_t turn = row % image - (image - turns.tokens);
        for (int i = 0; i < 3; ++i) {
          const float* sines = i < 2 && turn >= 0 ? turns.sines + turn * 2 * depth : nullptr;
          const float* values = own.floats + (row - first) * 3 * width + i * width;
          finite &= to_heads({values, width / depth, depth, depth, i < 2 && block.cosine_},
                             {sines, turns.stride, block.half_}, block.heads_[i], between + row * 3 * width + i * width,
                             reinterpret_cast<float*>(own.scratch));
        }
      }
      TORCH_CHECK_VALUE(finite, "q, k or v became NaN or Inf; they must be finite");
    });
  }
  // Attention of rows begin to end, of whatever images they belong to; all rows of these are through `before`.
  void attend(int64_t begin, int64_t end, const Own& own) const {
    const Workspace work(heads, own.scratch);
    for (int64_t first = begin / image * image; first < end; first += image) {
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, image);
      for (int64_t h = 0; h < block.attention_.heads; ++h) attend(first, h, 0, from, to, work);
    }
  }
  // Attention of one window of one image.
  void attend_window(int64_t image_index, int64_t window, const Workspace& work) const {
    for (int64_t h = 0; h < block.attention_.heads; ++h) attend(image_index * image, h, window, 0, heads.tokens, work);
  }
  // Rows begin to end of everything after attention.
  void after(int64_t begin, int64_t end, const Own& own) const {
    const LinearLayer& fc1 = block.fc1_;
    each_part(begin, end, [&](int64_t first, int64_t last) {
      add(block.norm1_, block.proj_, weights[1], attended + first * block.proj_.stride(), first, last, x, own);
      to_bytes(block.norm2_, fc1, out, first, last, own);
      if (block.gate_) {
        apply(fc1, weights[2], own.normed, 0, last - first, nullptr, own.floats, fc1.out_features, own.scratch);
        gate(last - first, own);
      } else {
        apply(fc1, weights[2], own.normed, 0, last - first, nullptr, own.hidden, block.fc2_.stride(), own.scratch);
      }
      if (block.table_) recode(last - first, own);
      add(block.norm2_, block.fc2_, weights[3], own.hidden, first, last, out, own);
    });
  }

 private:
  static int64_t most_together(const Block& b, int64_t rows) {
    const int64_t wide = kWideTogether / std::max<int64_t>(b.float_width() * sizeof(float), 1);
    const int64_t most = b.wide() || b.gate_ ? std::clamp<int64_t>(wide, 64, kMostTogether) : kMostTogether;
    return std::min(rows, most);
  }
  int64_t normed_bytes() const { return aligned(together * std::max(block.qkv_.stride(), block.fc1_.stride())); }
  int64_t hidden_bytes() const { return aligned(together * block.fc2_.stride()); }
  int64_t float_bytes() const { return aligned(together * block.float_width() * static_cast<int64_t>(sizeof(float))); }
  // Of any of the stages.
  int64_t scratch_bytes() const {
    int64_t most = std::max<int64_t>(Workspace::bytes(heads), block.proj_.in_features * sizeof(float));
    const LinearLayer* layers[] = {&block.qkv_, &block.proj_, &block.fc1_, &block.fc2_};
    for (int i = 0; i < 4; ++i) most = std::max(most, weights[i].scratch_bytes(layers[i]->count()));
    for (const NormLayer* layer : {&block.norm1_, &block.norm2_}) {
      most = std::max<int64_t>(most, layer->norm.scratch() * sizeof(float));
    }
    return aligned(most);
  }

  // work(first, last) for parts of begin to end of about the same size, `together` at most.
  template <class Work>
  void each_part(int64_t begin, int64_t end, const Work& work) const {
    const int64_t parts = (end - begin + together - 1) / together;
    for (int64_t part = 0; part < parts; ++part) {
      work(begin + (end - begin) * part / parts, begin + (end - begin) * (part + 1) / parts);
    }
  }
  void attend(int64_t first, int64_t head, int64_t window, int64_t begin, int64_t end, const Workspace& work) const {
    const int64_t channels = block.proj_.in_features;
    block.attention_.run(attention, heads, work, head, window, begin, end, between + first * 3 * channels, 3 * channels,
                         between + rows * 3 * channels + kDepth, attended + first * heads.out_stride);
  }
  // What fc2 takes in `count` rows, of the floats that fc1 gave.
  void gate(int64_t count, const Own& own) const {
    const int64_t width = block.fc1_.out_features, half = width / 2;
    const float *gates = own.floats + (block.gate_last_ ? half : 0),
                *values = own.floats + (block.gate_last_ ? 0 : half);
    const bool finite =
        to_hidden(gates, width, values, width, count, block.gate_->gate, own.hidden, block.fc2_.stride());
    TORCH_CHECK_VALUE(finite, "what fc1 gives became NaN or Inf; it must be finite");
  }
  // Each byte that fc2 takes in `count` rows to what the table has for it.
  void recode(int64_t count, const Own& own) const {
    const uint8_t* table = block.table_->data();
    for (int64_t row = 0; row < count; ++row) {
      uint8_t* bytes = own.hidden + row * block.fc2_.stride();
      for (int64_t k = 0; k < block.fc2_.in_features; ++k) bytes[k] = table[bytes[k]];
    }
  }
  // Rows first to last of what `next` takes, to own.normed.
  void to_bytes(const NormLayer& layer, const LinearLayer& next, const float* from, int64_t first, int64_t last,
                const Own& own) const {
    const int64_t channels = layer.norm.channels;
    const float* begin = from + first * channels;
    const bool finite = block.post_norm_ ? kernels.quantize(begin, Type::f32, last - first, channels, next.input,
                                                            own.normed, next.stride())
                                         : norms.quantize(begin, Type::f32, last - first, layer.norm, own.normed,
                                                          next.stride(), reinterpret_cast<float*>(own.scratch));
    TORCH_CHECK_VALUE(finite, "x held NaN or Inf; every value must be finite");
  }
  // Rows first to last of out: the residual, plus what a layer makes of `from`, its row 0 the first; through the norm
  // where that comes last.
  void add(const NormLayer& norm, const LinearLayer& layer, const Weight& weight, const uint8_t* from, int64_t first,
           int64_t last, const float* residual, const Own& own) const {
    const int64_t channels = norm.norm.channels;
    if (!block.post_norm_) {
      apply(layer, weight, from, first, last, residual, out, channels, own.scratch);
      return;
    }
    apply(layer, weight, from, 0, last - first, nullptr, own.floats, channels, own.scratch);
    norms.add(own.floats, last - first, norm.norm, residual + first * channels, out + first * channels,
              reinterpret_cast<float*>(own.scratch));
  }
  // A layer's result in the rows first to last of `to`; `from`: its row 0 is the first of them.
  void apply(const LinearLayer& layer, const Weight& weight, const uint8_t* from, int64_t first, int64_t last,
             const float* residual, void* to, int64_t to_stride, uint8_t* scratch) const {
    Epilogue e = layer.epilogue;
    e.columns = layer.columns.data();
    e.residual = residual;
    e.out = to;
    e.out_stride = to_stride;
    e.first_row = first;
    kernels.linear(from, layer.stride(), last - first, weight, 0, layer.count(), scratch, e);
  }
};

namespace {

template <typename T>
const std::vector<T>& counted(const char* name, const std::vector<T>& values, size_t count) {
  TORCH_CHECK_VALUE(values.size() == count, name, " had ", values.size(), " entries; a block has ", count);
  return values;
}

const BlockArguments& checked(const BlockArguments& a) {
  counted("norms", a.norms, 4), counted("eps", a.eps, 2), counted("weights", a.weights, 4);
  counted("biases", a.biases, 4), counted("weight_scales", a.weight_scales, 4), counted("w_bits", a.w_bits, 4);
  counted("scales", a.scales, 7), counted("zeros", a.zeros, 7), counted("a_bits", a.a_bits, 7);
  const int64_t channels = a.norms[0].numel();
  TORCH_CHECK_VALUE(a.gate == "none" || a.gate == "first" || a.gate == "last", "gate was '", a.gate,
                    "'; it may be 'none', 'first' or 'last'");
  const int64_t halves = a.gate == "none" ? 1 : 2, hidden = a.weight_scales[2].numel() / halves;
  const int64_t ins[] = {channels, a.weight_scales[0].numel() / 3, channels, hidden};
  const int64_t outs[] = {3 * ins[1], channels, halves * hidden, channels};
  for (int i = 0; i < 4; ++i) {
    TORCH_CHECK_VALUE(a.norms[i].numel() == channels, "norms[", i, "] had ", a.norms[i].numel(),
                      " values; the first has ", channels);
    TORCH_CHECK_VALUE(a.weight_scales[i].numel() == outs[i], "weight_scales[", i, "] had ", a.weight_scales[i].numel(),
                      " values; it must have ", outs[i]);
  }
  TORCH_CHECK_VALUE(!a.hidden_scale || a.hidden_scale->numel() == hidden, "hidden_scale had ",
                    a.hidden_scale ? a.hidden_scale->numel() : 0, " values; it must have ", hidden);
  TORCH_CHECK_VALUE(!a.hidden_table || (a.hidden_table->scalar_type() == at::kByte && a.hidden_table->numel() == 256),
                    "hidden_table was ", a.hidden_table ? a.hidden_table->scalar_type() : at::kByte, " of ",
                    a.hidden_table ? a.hidden_table->numel() : 0, " values; it must be uint8 [256]");
  TORCH_CHECK_VALUE(!a.post_norm || !a.acm, "acm was given with post_norm, whose norm would change it");
  TORCH_CHECK_VALUE(a.heads > 0 && ins[1] > 0 && ins[1] % a.heads == 0, "heads was ", a.heads, "; the ", ins[1],
                    " channels of q must be a multiple of it");
  return a;
}

LinearLayer linear_of(const BlockArguments& a, int i, int64_t in_features, int grid, const OptionalTensor& acm,
                      const char* activation, const OptionalTensor& out_scale, const OptionalTensor& out_zero,
                      int64_t out_bits) {
  return {a.weights[i],  a.biases[i].numel() ? OptionalTensor(a.biases[i]) : std::nullopt,
          acm,           a.scales[grid],
          a.zeros[grid], a.weight_scales[i],
          in_features,   a.a_bits[grid],
          a.w_bits[i],   activation,
          out_scale,     out_zero,
          out_bits,      out_scale ? at::kByte : at::kFloat};
}

at::Tensor hidden_scale_of(const BlockArguments& a) {
  return a.hidden_scale ? *a.hidden_scale : a.scales[6];
}

// fc1 gives what fc2 takes, or, where a gate follows, floats.
LinearLayer fc1_of(const BlockArguments& a) {
  const int64_t channels = a.norms[0].numel();
  if (a.gate != "none") return linear_of(a, 2, channels, 5, {}, "none", {}, {}, 8);
  return linear_of(a, 2, channels, 5, {}, a.activation.c_str(), hidden_scale_of(a), a.zeros[6], a.a_bits[6]);
}

at::Tensor three(const std::vector<at::Tensor>& values) {
  at::Tensor result = at::empty({3}, at::kFloat);
  for (int i = 0; i < 3; ++i) result.mutable_data_ptr<float>()[i] = scalar_of("a scale or zero point", values[i + 1]);
  return result;
}

}  // namespace

Block::Block(const BlockArguments& a, bool gather)
    : post_norm_(checked(a).post_norm),
      cosine_(a.head_scale.has_value()),
      half_(a.half),
      rotated_(a.rotated),
      gate_last_(a.gate == "last"),
      norm1_(a.norms[0], a.norms[1], a.eps[0], a.scales[0], a.zeros[0], a.a_bits[0]),
      norm2_(a.norms[2], a.norms[3], a.eps[1], a.scales[5], a.zeros[5], a.a_bits[5]),
      qkv_(linear_of(a, 0, a.norms[0].numel(), 0, {}, "none", wide() ? OptionalTensor() : three(a.scales),
                     wide() ? OptionalTensor() : three(a.zeros), a.a_bits[1])),
      proj_(linear_of(a, 1, a.weight_scales[0].numel() / 3, 4, {}, "none", {}, {}, 8)),
      fc1_(fc1_of(a)),
      fc2_(linear_of(a, 3, fc1_.out_features / (a.gate == "none" ? 1 : 2), 6, a.acm, "none", {}, {}, 8)),
      attention_(a.heads, three(a.scales), three(a.zeros), a.attention_scale, a.position_bias, a.mask, a.index,
                 a.scales[4], a.zeros[4], a.a_bits[4], a.head_scale) {
  TORCH_CHECK_VALUE(a.a_bits[1] == a.a_bits[2] && a.a_bits[1] == a.a_bits[3], "a_bits had ", a.a_bits[1], ", ",
                    a.a_bits[2], " and ", a.a_bits[3], " for q, k and v; they must be the same");
  for (int i = 0; i < 3; ++i) {
    const float step = scalar_of("a scale", a.scales[i + 1]), zero = scalar_of("a zero point", a.zeros[i + 1]);
    heads_[i] = {step, 1.0f / step, zero, static_cast<float>((1 << a.a_bits[1]) - 1)};
  }
  if (a.gate != "none") {
    gate_.emplace(hidden_scale_of(a), a.zeros[6], a.a_bits[6], fc2_.in_features, a.activation);
  }
  if (a.hidden_table) {
    const at::Tensor table = a.hidden_table->contiguous();
    std::copy_n(table.const_data_ptr<uint8_t>(), table_.emplace().size(), table_->begin());
  }
  if (gather) fc2_.gather_acm();
}

int64_t Block::float_width() const {
  int64_t width = wide() ? qkv_.out_features : 0;
  if (post_norm_) width = std::max(width, proj_.out_features);
  if (gate_) width = std::max(width, fc1_.out_features);
  return width;
}

bool Block::ordinary_heads() const {
  return std::all_of(heads_.begin(), heads_.end(), [](const Quantizer& q) { return ordinary_divisor(q.scale); });
}

void Block::drop_weights() {
  for (LinearLayer* layer : {&qkv_, &proj_, &fc1_, &fc2_}) {
    layer->blocks = at::Tensor();
    layer->weight.rows = nullptr;
  }
}

// With enough images every thread takes some of them through all stages in its own memory. Otherwise the threads share
// the rows, and wait for each other before attention, which needs the keys and values of a whole image.
at::Tensor Block::run(const at::Tensor& x, const OptionalTensor& rope, const Weights& weights) const {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() == 3 && x.size(2) == norm1_.norm.channels, "x was ",
                    x.scalar_type(), " ", x.sizes(), "; it must be float32 [B, T, ", norm1_.norm.channels, "]");
  TORCH_CHECK_VALUE(!attention_.places.defined() || attention_.places.numel() == x.size(1), "x had ", x.size(1),
                    " tokens; the windows have ", attention_.places.defined() ? attention_.places.numel() : 0);
  TORCH_CHECK_VALUE(!fc2_.corrections.defined() || fc2_.epilogue.tokens == x.size(1), "acm was made for ",
                    fc2_.epilogue.tokens, " tokens an image; these have ", x.size(1), ": quantize for this input size");
  attention_.check_tokens(x.size(1));
  TORCH_CHECK_VALUE(rope.has_value() == rotated_, "rope was ", rope ? "given" : "None", " to a block made for ",
                    rotated_ ? "one" : "none");
  const at::Tensor turned = rope ? rope->to(at::kFloat).contiguous() : at::Tensor();
  const Turns turns = turned.defined() ? turns_of(turned, x.size(1), attention_.heads, proj_.in_features) : Turns{};
  const at::Tensor input = x.contiguous();
  at::Tensor result = empty_result(input.sizes(), at::kFloat);
  if (input.numel() == 0) return result;
  const int64_t batch = input.size(0), image = input.size(1), channels = input.size(2), rows = batch * image;
  const int64_t threads = parallel_threads(), windows = attention_.windows;
  const float* from = input.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  if (batch % threads == 0 || batch >= 4 * threads) {
    const int64_t most = std::max<int64_t>(1, std::min(kRowsTogether / image, (batch + threads - 1) / threads));
    parallel_pieces((batch + most - 1) / most, [&](int64_t piece) {
      const int64_t first = piece * most, own = std::min(most, batch - first) * image;
      const int64_t shared = Stages::shared_bytes(*this, own);
      const Stages sizes(*this, weights, nullptr, nullptr, image, own, turns, nullptr);
      uint8_t* memory = thread_memory(shared + sizes.own_bytes());
      const Stages stages(*this, weights, from + first * image * channels, to + first * image * channels, image, own,
                          turns, memory);
      const Stages::Own mine = stages.own(memory + shared);
      stages.before(0, own, mine);
      if (windows == 1) {
        stages.attend(0, own, mine);
      } else {
        const Workspace work(stages.heads, mine.scratch);
        for (int64_t i = 0; i < own / image * windows; ++i) stages.attend_window(i / windows, i % windows, work);
      }
      stages.after(0, own, mine);
    });
    return result;
  }
  const at::Tensor shared = empty_result({Stages::shared_bytes(*this, rows) + kDepth}, at::kByte);
  uint8_t* memory = shared.mutable_data_ptr<uint8_t>();
  memory += -reinterpret_cast<uintptr_t>(memory) % kDepth;
  const Stages stages(*this, weights, from, to, image, rows, turns, memory);
  // One part of the rows for each thread: every part reads all the weights.
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t parts = (rows + share - 1) / share;
  const int64_t shared_windows = windows > 1 ? batch * windows : 0;
  Countdown before(parts), attended(shared_windows);
  Parts first_half(parts), second_half(parts);
  parallel_pieces(2 * parts + shared_windows, [&](int64_t piece) {
    const Stages::Own own = stages.own(thread_memory(stages.own_bytes()));
    if (piece >= parts) before.wait();
    if (piece >= parts && piece < parts + shared_windows) {
      const Countdown::Piece counted(attended);
      const int64_t window = piece - parts;
      stages.attend_window(window / windows, window % windows, Workspace(stages.heads, own.scratch));
      return;
    }
    const int64_t part = (piece < parts ? first_half : second_half).take();
    const int64_t first = part * share, last = std::min(rows, first + share);
    if (piece < parts) {
      const Countdown::Piece counted(before);
      stages.before(first, last, own);
    } else {
      attended.wait();
      if (windows == 1) stages.attend(first, last, own);
      stages.after(first, last, own);
    }
  });
  return result;
}

namespace {

at::Tensor quant_block(const at::Tensor& x, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList weights,
                       at::TensorList biases, at::TensorList weight_scales, at::IntArrayRef w_bits,
                       at::TensorList scales, at::TensorList zeros, at::IntArrayRef a_bits, int64_t heads,
                       double attention_scale, const OptionalTensor& position_bias, const OptionalTensor& mask,
                       const OptionalTensor& index, const OptionalTensor& acm, const OptionalTensor& hidden_scale,
                       c10::string_view activation, const OptionalTensor& head_scale, bool post_norm, bool half,
                       c10::string_view gate, const OptionalTensor& rope, const OptionalTensor& hidden_table) {
  const BlockArguments a{norms.vec(),
                         eps.vec(),
                         weights.vec(),
                         biases.vec(),
                         weight_scales.vec(),
                         w_bits.vec(),
                         scales.vec(),
                         zeros.vec(),
                         a_bits.vec(),
                         heads,
                         attention_scale,
                         position_bias,
                         mask,
                         index,
                         acm,
                         hidden_scale,
                         std::string(activation),
                         head_scale,
                         post_norm,
                         half,
                         std::string(gate),
                         rope.has_value(),
                         hidden_table};
  calm_openmp();
  const std::shared_ptr<const RememberedBlock> remembered = RememberedBlock::find(a);
  return remembered ? remembered->run(x, rope, a.weights) : Block(a, false).run(x, rope);
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quant_block", &dfqvit::quant::quant_block);
}
