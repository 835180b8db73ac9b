// An allocator of torch's kind over the C library's, with a short list of what was freed: see dfqvit/results.h.
#include "dfqvit/results.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace dfqvit {
namespace {

constexpr size_t kLeast = 1 << 17;        // bytes: below, the C library keeps its memory itself
constexpr size_t kMostKept = 256u << 20;  // bytes that nobody uses
constexpr size_t kMostBlocks = 64;

struct Block {
  void* data;
  size_t bytes;
};

class Kept {
 public:
  // One of `bytes`, or of at most a quarter more; null where there is none.
  Block* take(size_t bytes) {
    // A child of fork may find it locked for good.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto fits = [bytes](const Block* block) {
      return block->bytes >= bytes && block->bytes - bytes <= bytes / 4;
    };
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), fits);
    if (found == blocks_.rend()) return nullptr;
    Block* block = *found;
    blocks_.erase(std::next(found).base());
    bytes_ -= block->bytes;
    return block;
  }
  // The oldest go for it.
  void put(Block* block) {
    std::vector<Block*> gone;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && block->bytes <= kMostKept) {
        blocks_.push_back(block);
        bytes_ += block->bytes;
        while (bytes_ > kMostKept || blocks_.size() > kMostBlocks) {
          gone.push_back(blocks_.front());
          bytes_ -= gone.back()->bytes;
          blocks_.erase(blocks_.begin());
        }
      } else {
        gone.push_back(block);
      }
    }
    for (Block* each : gone) {
      c10::free_cpu(each->data);
      delete each;
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Block*> blocks_;  // the last freed at the end
  size_t bytes_ = 0;
};

// Never destroyed: tensors may outlive all static objects.
Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

void release(void* block) {
  kept().put(static_cast<Block*>(block));
}

struct Keeping final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Block* block = kept().take(bytes);
    if (block == nullptr) block = new Block{c10::alloc_cpu(bytes), bytes};
    return {block->data, block, &release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type) {
  size_t bytes = c10::elementSize(type);
  for (const int64_t size : sizes) bytes *= size;
  const at::Context& settings = at::globalContext();
  const bool filled = settings.deterministicAlgorithms() && settings.deterministicFillUninitializedMemory();
  if (bytes < kLeast || filled) return at::empty(sizes, type);
  static Keeping& allocator = *new Keeping;
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::detail::empty_generic(sizes, &allocator, cpu, type, at::MemoryFormat::Contiguous);
}

}  // namespace dfqvit
