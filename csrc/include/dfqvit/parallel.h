// Work in pieces, shared by the thread that calls and the threads of a pool. No torch headers.
//
// Pieces are claimed one at a time, in order. The caller works too and needs nobody: threads of the pool that come
// late, since other processes have the processors, find nothing left and go. Who waits spins for some microseconds and
// then sleeps, which leaves the processor to the thread that is waited for. Results must not depend on who does which
// piece.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace dfqvit {

// Threads that may share what is begun here: torch's setting for this thread, but no more than the CPUs that it may use
// (affinity and the quota of its control groups, rounded up); 1 within a piece or a parallel region of torch's.
int64_t parallel_threads();

// For operators that stand in code of torch.compile or AOTInductor, whose own loops are regions of OpenMP that no
// SerialTorch keeps on one thread: its threads spin for milliseconds after each, on the processors that ours want. From
// now on they sleep, in the whole process, which costs models of many small operators of torch's a third of their
// speed.
void calm_openmp();

// While it lives, torch's own operators run in one thread where this thread calls them; those of dfqvit have as many as
// before. For small operators of torch's between ours: its threads (OpenMP's) wait for each other, and for more work,
// by spinning for milliseconds, on the processors that our threads want.
class SerialTorch {
 public:
  SerialTorch();
  ~SerialTorch();
  SerialTorch(const SerialTorch&) = delete;
  SerialTorch& operator=(const SerialTorch&) = delete;
  // Ends it early, where torch's operators turn out to be most of the work.
  static void lift();

 private:
  bool outermost_;
};

// CPUs that the control groups in /proc/self/cgroup grant this process by their quotas, 0 for no limit. `root` stands
// before both paths, for tests.
double cpu_quota(const char* root);

// run(work, piece) for each piece from 0 to `pieces`, on `threads` threads at most; see parallel_pieces.
void run_pieces(int64_t pieces, int64_t threads, void (*run)(const void* work, int64_t piece), const void* work);

// work(piece) for each piece from 0 to `pieces`. The first exception of a piece reaches the caller, once all are out.
// A piece may wait for pieces before it (Countdown): they are done or with a running thread.
template <class Work>
void parallel_pieces(int64_t pieces, const Work& work) {
  run_pieces(
      pieces, parallel_threads(), [](const void* w, int64_t piece) { (*static_cast<const Work*>(w))(piece); }, &work);
}

// work(begin, end) for parts of 0 to `count`, of `grain` at least but for the last: some for each thread, so that a
// thread that has little of its processor takes fewer.
template <class Work>
void parallel_ranges(int64_t count, int64_t grain, const Work& work) {
  constexpr int64_t kEach = 4;
  const int64_t threads = parallel_threads(), parts = threads == 1 ? 1 : kEach * threads;
  const int64_t size = std::max<int64_t>(std::max<int64_t>(grain, 1), (count + parts - 1) / parts);
  parallel_pieces((count + size - 1) / size,
                  [&](int64_t part) { work(part * size, std::min(count, (part + 1) * size)); });
}

// Waiting threads: a short spin, then sleep.
class Waiters {
 public:
  // Until holds() is true; whoever makes it true calls wake() then.
  template <class Holds>
  void wait(const Holds& holds) {
    if (!holds()) wait([](const void* h) { return (*static_cast<const Holds*>(h))(); }, &holds);
  }
  // Lets `count` threads look again. Those that spin do so anyway.
  void wake(int64_t count);
  void wake_all();

 private:
  void wait(bool (*holds)(const void*), const void* state);

  std::atomic<int64_t> spinning_{0}, asleep_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

// Counts pieces that others wait for. The pieces and those who wait all belong to one parallel_pieces.
class Countdown {
 public:
  explicit Countdown(int64_t count) : left_(count) {}
  void wait() {
    waiters_.wait([this] { return left_ == 0; });
  }
  // Counts at the end of a scope, also of one that an exception leaves.
  class Piece {
   public:
    explicit Piece(Countdown& all) : all_(all) {}
    ~Piece() {
      if (--all_.left_ == 0) all_.waiters_.wake_all();
    }
    Piece(const Piece&) = delete;
    Piece& operator=(const Piece&) = delete;

   private:
    Countdown& all_;
  };

 private:
  std::atomic<int64_t> left_;
  Waiters waiters_;
};

}  // namespace dfqvit
