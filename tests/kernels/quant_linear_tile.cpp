// The CUDA kernel of quant_linear on a CPU, for tests: every thread of a tile in turn, through the kernel's own index
// arithmetic (dfqvit/quant_linear_tile.h). `ldmatrix` and `mma.sync` are emulated here from the PTX manual's words, not
// with that header, and shared memory starts out poisoned.
#include "dfqvit/quant_linear_tile.h"

#include <cstring>
#include <vector>

using namespace dfqvit::quant::tile;

namespace {

// ldmatrix.x4.b16: lane i gives the address of row i % 8 of matrix i / 8; of each matrix lane i then holds the two
// 16-bit values 2 * (i % 4) and on of row i / 4.
void load_matrices(const uint8_t* const (&rows)[32], uint32_t (&registers)[32][4]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) std::memcpy(&registers[lane][m], rows[8 * m + lane / 4] + 4 * (lane % 4), 4);
  }
}

int byte_of(uint32_t word, int i) {
  return word >> 8 * i & 255;
}

// mma.m16n8k32 .u8 .s8, PTX manual: group = lane / 4, t = lane % 4. Byte i of A (of 16): row group, plus 8 for i
// in 4..7 and 12..15; column t * 4 + i % 4, plus 16 from i = 8 on. Byte i of B (of 8): row t * 4 + i % 4, plus 16 from
// i = 4 on; column group. Sum i: row group, plus 8 from i = 2 on; column t * 2 + i % 2.
void multiply_add(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], int32_t (&sum)[32][4]) {
  int left[16][32], right[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const bool lower = (i >= 4 && i < 8) || i >= 12;
      left[group + (lower ? 8 : 0)][t * 4 + i % 4 + (i >= 8 ? 16 : 0)] = byte_of(a[lane][i / 4], i % 4);
    }
    for (int i = 0; i < 8; ++i) {
      right[t * 4 + i % 4 + (i >= 4 ? 16 : 0)][group] = static_cast<int8_t>(byte_of(b[lane][i / 4], i % 4));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) sum[lane][i] += left[row][k] * right[k][column];
    }
  }
}

struct Problem {
  const uint8_t *a, *b;
  int rows, outputs, depth;
  int64_t a_bytes, b_bytes;
};

template <typename S, int kBits>
void fill(const Problem& p, Place origin, int step, uint8_t* stage) {
  for (int thread = 0; thread < S::kThreads; ++thread) {
    for (int i = 0; i < S::kCopiesA; ++i) {
      const Place at = copied(thread, i, S::kThreads);
      const int64_t row = origin.row + at.row, byte = static_cast<int64_t>(step) * kDepth + at.column * kChunk;
      uint8_t* to = stage + shared_offset(at.row, at.column);
      std::memset(to, 0, kChunk);
      if (row < p.rows && byte < p.a_bytes) std::memcpy(to, p.a + row * p.a_bytes + byte, kChunk);
    }
    for (int i = 0; i < S::kCopiesB; ++i) {
      const Place at = copied(thread, i, S::kThreads);
      const int64_t n = origin.column + at.row, chunk = static_cast<int64_t>(step) * kChunks + at.column;
      uint8_t* to = stage + S::kM * kDepth + shared_offset(at.row, at.column);
      std::memset(to, 0, kChunk);
      const uint8_t* from = p.b + n * p.b_bytes + chunk * 2 * kBits;
      if (n >= p.outputs || chunk * 2 * kBits >= p.b_bytes) continue;
      if constexpr (kBits == 8) {
        std::memcpy(to, from, kChunk);
      } else {
        const Unpacked u = unpack<kBits>(load_packed<kBits>(from));
        std::memcpy(to, u.word, kChunk);
      }
    }
  }
}

template <typename S>
void multiply(const uint8_t* stage, int warp_index, int32_t (&sum)[S::kCountM][S::kCountN][32][4]) {
  const Place warp = warp_origin<S>(warp_index);
  for (int chunk = 0; chunk < kChunks; chunk += kMmaChunks) {
    uint32_t a[S::kCountM][32][4], b[S::kCountN / 2][32][4];
    const uint8_t* rows[32];
    for (int i = 0; i < S::kCountM; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const Place x = activation_address(lane);
        rows[lane] = stage + shared_offset(warp.row + i * kMmaM + x.row, chunk + x.column);
      }
      load_matrices(rows, a[i]);
    }
    for (int j = 0; j < S::kCountN / 2; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        const Place w = weight_address(lane);
        rows[lane] = stage + S::kM * kDepth + shared_offset(warp.column + j * 2 * kMmaN + w.row, chunk + w.column);
      }
      load_matrices(rows, b[j]);
    }
    for (int i = 0; i < S::kCountM; ++i) {
      for (int j = 0; j < S::kCountN; ++j) {
        uint32_t pair[32][2];
        for (int lane = 0; lane < 32; ++lane) std::memcpy(pair[lane], &b[j / 2][lane][j % 2 * 2], 8);
        multiply_add(a[i], pair, sum[i][j]);
      }
    }
  }
}

template <typename S, int kBits>
void product(const Problem& p, int32_t* out, int32_t* written) {
  std::vector<uint8_t> stage(S::kStageBytes, 0xAB);
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Place origin = tile_origin<S>(tile, p.outputs);
    struct Sums {
      int32_t value[S::kCountM][S::kCountN][32][4];
    };
    std::vector<Sums> sums(S::kThreads / 32);
    std::memset(static_cast<void*>(sums.data()), 0, sums.size() * sizeof(Sums));
    for (int step = 0; step < (p.depth + kDepth - 1) / kDepth; ++step) {
      fill<S, kBits>(p, origin, step, stage.data());
      for (int warp = 0; warp < S::kThreads / 32; ++warp) multiply<S>(stage.data(), warp, sums[warp].value);
    }
    for (int warp = 0; warp < S::kThreads / 32; ++warp) {
      for (int m = 0; m < S::kCountM; ++m) {
        int32_t panel[kMmaM][kPanelPitch];
        std::memset(panel, 0xAB, sizeof panel);
        for (int i = 0; i < S::kCountN * 32 * 4; ++i) {
          const int n = i / 128, lane = i / 4 % 32;
          const Place at = summed(lane, i % 4);
          panel[at.row][n * kMmaN + at.column] = sums[warp].value[m][n][lane][i % 4];
        }
        for (int i = 0; i < 32 * 4 * 4; ++i) {
          const Place at = finished(i / 16), begin = warp_origin<S>(warp);
          const int below = at.row + i / 4 % 4 * 4;
          const int64_t row = origin.row + begin.row + m * kMmaM + below;
          const int64_t column = origin.column + begin.column + at.column + i % 4;
          if (row >= p.rows || column >= p.outputs) continue;
          out[row * p.outputs + column] = panel[below][at.column + i % 4];
          ++written[row * p.outputs + column];
        }
      }
    }
  }
}

template <typename S>
void product(const Problem& p, int bits, int32_t* out, int32_t* written) {
  switch (bits) {
    case 2:
      return product<S, 2>(p, out, written);
    case 3:
      return product<S, 3>(p, out, written);
    case 4:
      return product<S, 4>(p, out, written);
    case 5:
      return product<S, 5>(p, out, written);
    case 6:
      return product<S, 6>(p, out, written);
    case 7:
      return product<S, 7>(p, out, written);
    default:
      return product<S, 8>(p, out, written);
  }
}

}  // namespace

extern "C" {

// out [rows, outputs] = a [rows, depth] (rows of a_bytes) times b [outputs, depth] packed in `bits` (rows of b_bytes);
// `written` counts the writes of each.
void tile_product(const uint8_t* a, int64_t a_bytes, const uint8_t* b, int64_t b_bytes, int rows, int outputs,
                  int depth, int bits, int large, int32_t* out, int32_t* written) {
  const Problem p{a, b, rows, outputs, depth, a_bytes, b_bytes};
  large ? product<Large>(p, bits, out, written) : product<Small>(p, bits, out, written);
}

// The greatest number of the 8 rows of an `ldmatrix` that share a bank, over all rows and chunks.
int tile_bank_conflicts() {
  int worst = 0;
  for (int row = 0; row < 128; row += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      int used[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int count = ++used[shared_offset(row + i, chunk) / 16 % 8];
        worst = count > worst ? count : worst;
      }
    }
  }
  return worst;
}

// The tokens that a lane finds for its `count` rows, from its first one on.
void tile_tokens(int row, int tokens, int count, int32_t* out) {
  int token = row % tokens;
  for (int i = 0; i < count; ++i, token = token_below(token, tokens)) out[i] = token;
}

// The greatest number of lanes that meet in a bank when half a warp stores its pairs of sums in a panel.
int tile_panel_conflicts() {
  int used[32] = {}, worst = 0;
  for (int lane = 0; lane < 16; ++lane) {
    const Place at = summed(lane, 0);
    for (int i = 0; i < 2; ++i) {
      const int count = ++used[(at.row * kPanelPitch + at.column + i) % 32];
      worst = count > worst ? count : worst;
    }
  }
  return worst;
}

void tile_column_sums(const uint8_t* b, int64_t b_bytes, int outputs, int depth, int bits, int32_t* out) {
  for (int n = 0; n < outputs; ++n) {
    out[n] = 0;
    for (int k = 0; k < depth; ++k) out[n] += unpacked_at(b + n * b_bytes, k, bits);
  }
}

void tile_quantize(const float* x, int64_t count, float scale, float zero, float least, float greatest, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = quantized(x[i], scale, zero, least, greatest);
}

void tile_dequantize(const int32_t* sum, int64_t count, int32_t offset, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = dequantized(sum[i], offset, scale);
}

void tile_activate(const float* y, int64_t count, int activation, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = activated(y[i], static_cast<Activation>(activation));
}
}
