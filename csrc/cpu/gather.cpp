// Copies by runs of neighbouring floats: see dfqvit/gather.h.
#include "dfqvit/gather.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dfqvit/parallel.h"

namespace dfqvit {
namespace {

constexpr int64_t kShortest = 8, kPart = 1 << 14;  // floats of a run, and of what a thread takes, at least

struct Dimension {
  int64_t size, stride;
};

// From the inside out, those merged that lie in memory as one.
std::vector<Dimension> merged(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  std::vector<Dimension> found;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (!found.empty() && strides[d] == found.back().size * found.back().stride) {
      found.back().size *= sizes[d];
    } else {
      found.push_back({sizes[d], strides[d]});
    }
  }
  return found;
}

void copy(const float* from, int64_t count, float* to) {
  for (; count >= 16; count -= 16, from += 16, to += 16) std::memcpy(to, from, 16 * sizeof(float));
  std::memcpy(to, from, count * sizeof(float));
}

}  // namespace

bool gather(const float* from, const int64_t* sizes, const int64_t* strides, int64_t dims, float* to) {
  std::vector<Dimension> all = merged(sizes, strides, dims);
  if (all.empty() || all[0].stride != 1 || all[0].size < kShortest) return false;
  all.resize(std::max<size_t>(all.size(), 2), {1, 0});
  const Dimension run = all[0], lines = all[1];
  int64_t count = 1;  // of planes of some runs
  for (size_t d = 2; d < all.size(); ++d) count *= all[d].size;
  const int64_t plane = run.size * lines.size;
  parallel_ranges(count, (kPart + plane - 1) / std::max<int64_t>(plane, 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float* first = from;
      int64_t left = k;
      for (size_t d = 2; d < all.size(); ++d, left /= all[d - 1].size) first += left % all[d].size * all[d].stride;
      float* out = to + k * plane;
      for (int64_t i = 0; i < lines.size; ++i) copy(first + i * lines.stride, run.size, out + i * run.size);
    }
  });
  return true;
}

}  // namespace dfqvit
