// Stands for torch's header: what csrc/cpu/parallel.cpp asks of torch is what a test says.
#pragma once

#include <atomic>

namespace at {

inline std::atomic<int> num_threads{8};
inline thread_local bool in_region = false;

inline int get_num_threads() {
  return num_threads;
}
inline bool in_parallel_region() {
  return in_region;
}

}  // namespace at
