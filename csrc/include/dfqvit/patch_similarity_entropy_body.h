// The CPU kernels of patch_similarity_entropy, on raw pointers. No include guard: the includer sets DFQVIT_PATH (a
// namespace of simd.h) and DFQVIT_TARGET (its function attribute) and includes this once for each path.
//
// A set is `unit`, its N normalised vectors [n, stride] with zeros from column `depth` on. Similarities exist only as
// one tile [kTile, kTile] in cache; each unordered pair of distinct vectors is visited once and the diagonal never,
// since it is known. Cells of a tile that are no such pair hold NaN, which min, max and exp2_nonpositive pass over.

namespace dfqvit {
namespace entropy {
namespace DFQVIT_PATH {

using namespace simd::DFQVIT_PATH;

constexpr int kBlockRows = 4;    // rows of a register tile
constexpr int kDepthBlock = 64;  // products summed before they join the rest: keeps partial sums short

// panel[d][c] = unit[first + c][d], zero from column `columns` on.
DFQVIT_TARGET static void pack_panel(const Set& set, int64_t first, int columns, float* panel) {
  for (int c = 0; c < kTile; ++c) {
    const float* row = set.unit + (first + c) * set.stride;
    for (int64_t d = 0; d < set.depth; ++d) panel[d * kTile + c] = c < columns ? row[d] : 0.0f;
  }
}

// s[r][column ...] += rows x panel, over depth [begin, end), for V vectors of columns.
template <int V>
DFQVIT_TARGET static void multiply_block(const float* const* rows, const float* panel, int64_t begin, int64_t end,
                                         float* s) {
  vec sum[kBlockRows][V];
  for (int r = 0; r < kBlockRows; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = broadcast(0.0f);
  }
  for (int64_t d = begin; d < end; ++d) {
    vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(panel + d * kTile + v * kLanes);
    for (int r = 0; r < kBlockRows; ++r) {
      const vec a = broadcast(rows[r][d]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kBlockRows; ++r) {
    for (int v = 0; v < V; ++v) {
      float* cell = s + r * kTile + v * kLanes;
      store(cell, begin == 0 ? sum[r][v] : add(load(cell), sum[r][v]));
    }
  }
}

// The similarities of rows [first_row, first_row + rows) with a packed panel that starts at first_column.
DFQVIT_TARGET static void similarity_tile(const Set& set, int64_t first_row, int rows, int64_t first_column,
                                          int columns, const float* panel, float* s) {
  const int used = (columns + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < rows; r += kBlockRows) {
    const float* block[kBlockRows];
    for (int i = 0; i < kBlockRows; ++i) {
      block[i] = set.unit + (first_row + (r + i < rows ? r + i : rows - 1)) * set.stride;
    }
    for (int64_t begin = 0; begin < set.depth; begin += kDepthBlock) {
      const int64_t end = begin + kDepthBlock < set.depth ? begin + kDepthBlock : set.depth;
      int c = 0;
      for (; c + kVectors * kLanes <= used; c += kVectors * kLanes) {
        multiply_block<kVectors>(block, panel + c, begin, end, s + r * kTile + c);
      }
      for (; c < used; c += kLanes) multiply_block<1>(block, panel + c, begin, end, s + r * kTile + c);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = columns; c < used; ++c) s[r * kTile + c] = NAN;
    if (first_row == first_column) s[r * kTile + r] = NAN;
  }
}

DFQVIT_TARGET static void range_of_panel(const Set& set, int64_t panel_index, Scratch& scratch, float* ends) {
  const int64_t first = panel_index * kTile;
  const int columns = set.tile_size(panel_index);
  pack_panel(set, first, columns, scratch.panel);
  vec least = broadcast(INFINITY), greatest = broadcast(-INFINITY);
  for (int64_t tile = panel_index; tile < set.tiles(); ++tile) {
    const int rows = set.tile_size(tile);
    similarity_tile(set, tile * kTile, rows, first, columns, scratch.panel, scratch.tile);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += kLanes) {
        const vec s = load(scratch.tile + r * kTile + c);
        least = min(s, least);
        greatest = max(s, greatest);
      }
    }
  }
  ends[0] = reduce_min(least);
  ends[1] = reduce_max(greatest);
}

// lanes[j] += the Gaussians of V vectors of similarities around place j, for the places where they are not 0.
template <int V>
DFQVIT_TARGET static inline void density_run(const float* similarities, const Gaussians& g, float* lanes) {
  vec s[V];
  for (int v = 0; v < V; ++v) s[v] = load(similarities + v * kLanes);
  vec low = min(s[0], broadcast(2.0f)), high = max(s[0], broadcast(-2.0f));
  for (int v = 1; v < V; ++v) {
    low = min(s[v], low);
    high = max(s[v], high);
  }
  const Span span = g.span(reduce_min(low), reduce_max(high));
  const vec scale = broadcast(g.scale);
  for (int32_t j = span.begin; j < span.end; ++j) {
    const vec x = broadcast(g.places[j]);
    vec sum = load(lanes + j * kLanes);
    for (int v = 0; v < V; ++v) {
      const vec d = sub(s[v], x);
      sum = add(sum, exp2_nonpositive(mul(mul(d, d), scale)));
    }
    store(lanes + j * kLanes, sum);
  }
}

// sums[j] = the Gaussians around place j of all ordered pairs of distinct vectors with one in this panel and the other
// in this panel or a later one.
DFQVIT_TARGET static void density_of_panel(const Set& set, int64_t panel_index, const Gaussians& g, Scratch& scratch,
                                           double* sums) {
  const int64_t first = panel_index * kTile;
  const int columns = set.tile_size(panel_index);
  pack_panel(set, first, columns, scratch.panel);
  for (int32_t j = 0; j < g.points; ++j) sums[j] = 0.0;
  for (int64_t tile = panel_index; tile < set.tiles(); ++tile) {
    const int rows = set.tile_size(tile);
    similarity_tile(set, tile * kTile, rows, first, columns, scratch.panel, scratch.tile);
    for (int64_t i = 0; i < static_cast<int64_t>(g.points) * kLanes; ++i) scratch.lanes[i] = 0.0f;
    for (int r = 0; r < rows; ++r) {
      const float* row = scratch.tile + r * kTile;
      int c = 0;
      for (; c + 3 * kLanes < columns; c += 4 * kLanes) density_run<4>(row + c, g, scratch.lanes);
      for (; c < columns; c += kLanes) density_run<1>(row + c, g, scratch.lanes);
    }
    const double weight = tile == panel_index ? 1.0 : 2.0;
    for (int32_t j = 0; j < g.points; ++j) {
      double sum = 0.0;
      for (int l = 0; l < kLanes; ++l) sum += scratch.lanes[j * kLanes + l];
      sums[j] += weight * sum;
    }
  }
}

// similarities -> dloss/ds, for V vectors, in place.
template <int V>
DFQVIT_TARGET static inline void slope_run(float* similarities, const Gaussians& g) {
  vec s[V], slope[V];
  for (int v = 0; v < V; ++v) {
    s[v] = load(similarities + v * kLanes);
    slope[v] = broadcast(0.0f);
  }
  vec low = min(s[0], broadcast(2.0f)), high = max(s[0], broadcast(-2.0f));
  for (int v = 1; v < V; ++v) {
    low = min(s[v], low);
    high = max(s[v], high);
  }
  const Span span = g.span(reduce_min(low), reduce_max(high));
  const vec scale = broadcast(g.scale);
  for (int32_t j = span.begin; j < span.end; ++j) {
    const vec x = broadcast(g.places[j]), factor = broadcast(g.factors[j]);
    for (int v = 0; v < V; ++v) {
      const vec d = sub(s[v], x);
      slope[v] = fma(mul(factor, d), exp2_nonpositive(mul(mul(d, d), scale)), slope[v]);
    }
  }
  for (int v = 0; v < V; ++v) store(similarities + v * kLanes, slope[v]);
}

DFQVIT_TARGET static void slope_tile(float* tile, int rows, int columns, bool diagonal, const Gaussians& g) {
  for (int r = 0; r < rows; ++r) {
    float* row = tile + r * kTile;
    int c = 0;
    for (; c + 3 * kLanes < columns; c += 4 * kLanes) slope_run<4>(row + c, g);
    for (; c < columns; c += kLanes) slope_run<1>(row + c, g);
    if (diagonal) row[r] = 0.0f;
  }
}

// A product with a tile of slopes: target[r] += sum_t slopes[r * row_step + t * term_step] * source[t].
struct Product {
  const float* slopes;
  int rows, row_step, terms, term_step;
  const float* source;
  float* target;
  int64_t stride;
};

template <int V>
DFQVIT_TARGET static void product_block(const Product& p, int first_row, int64_t column) {
  vec sum[kBlockRows][V];
  const float* slopes[kBlockRows];
  for (int r = 0; r < kBlockRows; ++r) {
    const int row = first_row + r < p.rows ? first_row + r : p.rows - 1;
    slopes[r] = p.slopes + row * p.row_step;
    for (int v = 0; v < V; ++v) sum[r][v] = load(p.target + row * p.stride + column + v * kLanes);
  }
  const float* source = p.source + column;
  for (int t = 0; t < p.terms; ++t) {
    vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(source + t * p.stride + v * kLanes);
    for (int r = 0; r < kBlockRows; ++r) {
      const vec a = broadcast(slopes[r][t * p.term_step]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kBlockRows && first_row + r < p.rows; ++r) {
    for (int v = 0; v < V; ++v) store(p.target + (first_row + r) * p.stride + column + v * kLanes, sum[r][v]);
  }
}

DFQVIT_TARGET static void add_product(const Product& p) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= p.stride; column += kVectors * kLanes) {
    for (int r = 0; r < p.rows; r += kBlockRows) product_block<kVectors>(p, r, column);
  }
  for (; column < p.stride; column += kLanes) {
    for (int r = 0; r < p.rows; r += kBlockRows) product_block<1>(p, r, column);
  }
}

// grad [n, stride] = the gradient of the unit vectors, but for the diagonal. Each pair is visited once.
DFQVIT_TARGET static void backward_of_set(const Set& set, const Gaussians& g, Scratch& scratch, float* grad) {
  std::memset(grad, 0, sizeof(float) * set.n * set.stride);
  for (int64_t panel = 0; panel < set.tiles(); ++panel) {
    const int64_t first = panel * kTile;
    const int columns = set.tile_size(panel);
    pack_panel(set, first, columns, scratch.panel);
    for (int64_t tile = panel; tile < set.tiles(); ++tile) {
      const int64_t first_row = tile * kTile;
      const int rows = set.tile_size(tile);
      similarity_tile(set, first_row, rows, first, columns, scratch.panel, scratch.tile);
      slope_tile(scratch.tile, rows, columns, tile == panel, g);
      add_product({scratch.tile, rows, kTile, columns, 1, set.unit + first * set.stride, grad + first_row * set.stride,
                   set.stride});
      if (tile != panel) {
        add_product({scratch.tile, columns, 1, rows, kTile, set.unit + first_row * set.stride,
                     grad + first * set.stride, set.stride});
      }
    }
  }
}

// grad [kTile, stride] = the same for the rows of one tile alone, for sets that several threads share.
DFQVIT_TARGET static void backward_of_rows(const Set& set, int64_t tile, const Gaussians& g, Scratch& scratch,
                                           float* grad) {
  const int rows = set.tile_size(tile);
  std::memset(grad, 0, sizeof(float) * rows * set.stride);
  for (int64_t panel = 0; panel < set.tiles(); ++panel) {
    const int64_t first = panel * kTile;
    const int columns = set.tile_size(panel);
    pack_panel(set, first, columns, scratch.panel);
    similarity_tile(set, tile * kTile, rows, first, columns, scratch.panel, scratch.tile);
    slope_tile(scratch.tile, rows, columns, tile == panel, g);
    add_product({scratch.tile, rows, kTile, columns, 1, set.unit + first * set.stride, grad, set.stride});
  }
}

constexpr Kernels kKernels = {range_of_panel, density_of_panel, backward_of_set, backward_of_rows};

}  // namespace DFQVIT_PATH
}  // namespace entropy
}  // namespace dfqvit
