// The pool of threads behind dfqvit/parallel.h.
//
// A call publishes its pieces in a slot; idle threads of the pool look through the slots and enter. The pool and its
// slots are never freed, and its threads never end: at exit they sleep, or go with the process.
#include "dfqvit/parallel.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if AT_PARALLEL_OPENMP  // all found in the runtime that torch loads
#include <dlfcn.h>
extern "C" void omp_set_num_threads(int);  // of the calling thread
extern "C" int omp_get_num_procs(void);
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
#endif

#ifdef __linux__
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
#endif

namespace dfqvit {
namespace {

// MKL, which computes sines and products for torch where torch was built with it, counts its threads for itself; this
// sets the count of the calling thread, 0 for as many as all have, and gives what it was: torch.set_num_threads sets
// it.
int set_mkl_threads(int threads) {
#ifdef __linux__
  if (MKL_Set_Num_Threads_Local != nullptr) return MKL_Set_Num_Threads_Local(threads);
#endif
  static_cast<void>(threads);
  return 0;
}

void set_torch_threads(int threads) {
#if AT_PARALLEL_OPENMP
  omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

// GNU's runtime lets its threads sleep at once when it knows of more threads than there are processors. With ours there
// are, so it is told: one thread holds as many of its own, all asleep, until the process ends. Not where the user
// decided on waiting.
void let_openmp_sleep() {
#if AT_PARALLEL_OPENMP
  Dl_info found{};
  const bool gnu = GOMP_parallel != nullptr && dladdr(reinterpret_cast<const void*>(&GOMP_parallel), &found) != 0 &&
                   std::strstr(found.dli_fname, "libgomp") != nullptr;
  const auto chosen = [](const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr && *value != 0;
  };
  if (!gnu || chosen("OMP_WAIT_POLICY") || chosen("GOMP_SPINCOUNT")) return;
  std::thread([] {
    GOMP_parallel([](void*) {}, nullptr, static_cast<unsigned>(omp_get_num_procs()) + 1, 0);
    for (;;) pause();
  }).detach();
#endif
}

constexpr int kSlots = 16;  // calls that share the pool at a time; more of them work alone

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds kSpin{60};  // of a thread that waits, before it sleeps: what lies between two blocks of a model
constexpr microseconds kStall{200};  // that a caller sleeps longer than it works: see Pool::learn
constexpr microseconds kLeastRest{8000}, kMostRest{64000};

thread_local bool working = false;      // on a piece
thread_local Clock::duration slept{0};  // by this thread within its calls
thread_local int torch_threads = 0;     // that torch had here before SerialTorch, while there is one
thread_local int mkl_threads = 0;       // and MKL

struct Job {
  void (*run)(const void* work, int64_t piece);
  const void* work;
  int64_t pieces;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  // A piece that was claimed is also run: others may wait for it.
  void help() {
    working = true;
    try {
      while (!failed) {
        const int64_t piece = next++;
        if (piece >= pieces) break;
        run(work, piece);
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    working = false;
  }
};

struct alignas(64) Slot {
  static constexpr uint32_t kTaken = 1u << 31, kOpen = 1u << 30, kInside = (1u << 15) - 1, kMost = 15;

  // In one word: whether a call has the slot, whether threads may enter, how many may be inside, how many are.
  std::atomic<uint32_t> state{0};
  Job* job = nullptr;
  Waiters owner;

  bool take() {
    uint32_t free = 0;
    return state == 0 && state.compare_exchange_strong(free, kTaken);
  }
  void open(Job& pieces, int64_t helpers) {
    job = &pieces;
    state = kTaken | kOpen | static_cast<uint32_t>(std::min<int64_t>(helpers, kInside)) << kMost;
  }
  void close() { state &= ~kOpen; }
  void release() {
    owner.wait([this] { return (state & kInside) == 0; });
    state = 0;
  }
  // Then `job` is there until leave().
  bool enter() {
    uint32_t seen = state;
    while ((seen & kOpen) && (seen & kInside) < (seen >> kMost & kInside)) {
      if (state.compare_exchange_weak(seen, seen + 1)) return true;
    }
    return false;
  }
  void leave() {
    if ((--state & (kOpen | kInside)) == 0) owner.wake_all();
  }
};

class Pool {
 public:
  static Pool& get() {
    Pool* pool = current();
    if (pool != nullptr) return *pool;
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      current() = nullptr;  // its threads did not come along
      working = false;
    });
    (void)registered;
    Pool* made = new Pool;
    if (current().compare_exchange_strong(pool, made)) return *made;
    delete made;
    return *pool;
  }

  int64_t cpus() const {
    if (fixed_ > 0) return fixed_;
    int64_t found = 0;
#ifdef __linux__
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof(mine), &mine) == 0) found = CPU_COUNT(&mine);
#endif
    if (found == 0) found = all_cpus_;
    if (quota_ > 0) found = std::min(found, static_cast<int64_t>(std::ceil(quota_)));
    return std::max<int64_t>(found, 1);
  }

  // On up to `helpers` threads beside the caller.
  void run(Job& job, int64_t helpers) {
    const Clock::time_point begin = Clock::now();
    if (begin.time_since_epoch().count() < alone_until_) return job.help();
    Slot* slot = nullptr;
    for (Slot& each : slots_) {
      if (each.take()) {
        slot = &each;
        break;
      }
    }
    if (slot == nullptr) return job.help();
    grow(helpers);
    slot->open(job, helpers);
    ++news_;
    idle_.wake(helpers);
    slept = Clock::duration{0};
    job.help();
    slot->close();
    slot->release();
    learn(begin, Clock::now());
  }

  void tell_openmp() {
    if (told_openmp_ || parallel_threads() == 1) return;
    starting([this] {
      if (!told_openmp_.exchange(true)) let_openmp_sleep();
    });
  }

 private:
  // DFQVIT_CPUS: so many CPUs, whatever the system says, and helpers at all times. For tests.
  Pool() : quota_(cpu_quota("")) {
    const char* cpus = std::getenv("DFQVIT_CPUS");
    fixed_ = cpus == nullptr ? 0 : std::atoll(cpus);
  }

  // A helper that has lost its processor holds its piece for a whole turn of another process, some milliseconds. When
  // the caller slept longer than it worked, this is what happened: then calls do without helpers for a while.
  void learn(Clock::time_point begin, Clock::time_point end) {
    if (fixed_ > 0) return;
    const int64_t rest = rest_;
    if (slept > end - begin - slept + kStall) {
      alone_until_ = (end.time_since_epoch() + microseconds(rest)).count();
      rest_ = std::min<int64_t>(2 * rest, kMostRest.count());
    } else if (rest > kLeastRest.count()) {
      rest_ = rest - rest / 64;
    }
  }

  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }

  void grow(int64_t threads) {
    if (threads <= started_) return;
    starting([&] {
      for (; started_ < threads; ++started_) std::thread([this] { serve(); }).detach();
    });
  }

  // Starts threads that take no signals: these are for the program's own.
  template <typename Start>
  void starting(const Start& start) {
    const std::lock_guard<std::mutex> lock(growing_);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      start();
    } catch (const std::system_error&) {  // no more threads to be had: fewer do
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
#ifdef __linux__
    pthread_setname_np(pthread_self(), "dfqvit");
#endif
    for (int first = 0;;) {
      const uint64_t news = news_;
      bool helped = false;
      for (int i = 0; i < kSlots; ++i) {
        Slot& slot = slots_[(first + i) % kSlots];
        if (!slot.enter()) continue;
        slot.job->help();
        slot.close();  // nothing is left to claim
        slot.leave();
        first = (first + i + 1) % kSlots;  // another call's turn
        helped = true;
        break;
      }
      if (!helped) idle_.wait([&] { return news_ != news; });
    }
  }

  Slot slots_[kSlots];
  std::atomic<uint64_t> news_{0};  // calls so far
  Waiters idle_;
  std::atomic<int64_t> alone_until_{0}, rest_{kLeastRest.count()};
  std::mutex growing_;
  std::atomic<int64_t> started_{0};
  std::atomic<bool> told_openmp_{false};
  double quota_;
  int64_t fixed_, all_cpus_ = std::thread::hardware_concurrency();
};

}  // namespace

void Waiters::wait(bool (*holds)(const void*), const void* state) {
  ++spinning_;
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (holds(state)) {
        --spinning_;
        return;
      }
#if defined(__x86_64__) || defined(__i386__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("isb" ::: "memory");
#endif
    }
  } while (Clock::now() < end);
  std::unique_lock<std::mutex> lock(mutex_);
  ++asleep_;
  --spinning_;
  condition_.wait(lock, [&] { return holds(state); });
  --asleep_;
  slept += Clock::now() - end;
}

// Who is about to sleep has the mutex: once it is free they sleep, and can be woken, or have seen what changed.
void Waiters::wake(int64_t count) {
  if (asleep_ == 0) return;
  mutex_.lock();
  mutex_.unlock();
  for (count -= spinning_; count > 0; --count) condition_.notify_one();
}

void Waiters::wake_all() {
  if (asleep_ == 0) return;
  mutex_.lock();
  mutex_.unlock();
  condition_.notify_all();
}

int64_t parallel_threads() {
  if (working || at::in_parallel_region()) return 1;
  const int64_t asked = torch_threads > 0 ? torch_threads : at::get_num_threads();
  return asked == 1 ? 1 : std::min<int64_t>(asked, Pool::get().cpus());
}

SerialTorch::SerialTorch() : outermost_(torch_threads == 0) {
  if (!outermost_) return;
  torch_threads = at::get_num_threads();
  set_torch_threads(1);
  mkl_threads = set_mkl_threads(1);
}

SerialTorch::~SerialTorch() {
  if (!outermost_) return;
  lift();
  torch_threads = 0;
}

void SerialTorch::lift() {
  if (torch_threads > 0) set_mkl_threads(mkl_threads);
  if (torch_threads > 1 && at::get_num_threads() == 1) set_torch_threads(torch_threads);
}

void calm_openmp() {
  if (torch_threads == 0) Pool::get().tell_openmp();
}

void run_pieces(int64_t pieces, int64_t threads, void (*run)(const void* work, int64_t piece), const void* work) {
  if (threads == 1 || pieces <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) run(work, piece);
    return;
  }
  Job job{run, work, pieces};
  Pool::get().run(job, std::min(threads, pieces) - 1);
  if (job.error) std::rethrow_exception(job.error);
}

double cpu_quota(const char* root) {
  double least = 0;
  const auto limit = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  };
  const auto number = [](const std::string& path) {
    double value = 0;
    std::ifstream(path) >> value;
    return value;
  };
  std::ifstream groups(std::string(root) + "/proc/self/cgroup");  // lines of hierarchy:controllers:path
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string mount = std::string(root) + "/sys/fs/cgroup" + (unified ? "" : "/cpu");
    for (std::string group = line.substr(second + 1);; group.erase(group.rfind('/'))) {  // and all that it is in
      if (unified) {
        double quota = 0, period = 0;  // "max" is no number
        std::ifstream(mount + group + "/cpu.max") >> quota >> period;
        limit(quota, period);
      } else {
        limit(number(mount + group + "/cpu.cfs_quota_us"), number(mount + group + "/cpu.cfs_period_us"));
      }
      if (group.find('/') == std::string::npos) break;
    }
  }
  return least;
}

}  // namespace dfqvit
