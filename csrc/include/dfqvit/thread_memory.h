// Memory of a thread that stays for its next call, so that a kernel's scratch costs no page faults. No torch headers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace dfqvit {

// So many bytes that what follows them lies at a multiple of 64 too.
inline int64_t aligned(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// At least `bytes` bytes at a multiple of 64. Valid until the thread asks for more; holds what was left there.
inline uint8_t* thread_memory(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
  }
  return static_cast<uint8_t*>(memory.get());
}

}  // namespace dfqvit
