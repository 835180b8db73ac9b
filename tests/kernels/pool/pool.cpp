// The pool of threads by itself: test_parallel.py compiles this with csrc/cpu/parallel.cpp and runs one case a process,
// which ends with status 0 when all held. Also under ThreadSanitizer.
#include <ATen/Parallel.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dfqvit/parallel.h"

#define CHECK(condition)                                             \
  if (!(condition)) {                                                \
    std::fprintf(stderr, "line %d: not %s\n", __LINE__, #condition); \
    std::exit(1);                                                    \
  }

namespace {

using dfqvit::Countdown;
using dfqvit::parallel_pieces;
using dfqvit::parallel_ranges;
using dfqvit::parallel_threads;

// Every piece once; what a piece wrote is seen by the caller.
void each_once(int64_t pieces) {
  std::vector<int> done(pieces);
  parallel_pieces(pieces, [&](int64_t piece) { ++done[piece]; });
  for (const int count : done) CHECK(count == 1);
}

void pieces() {
  for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int i = 0; i < 200; ++i) each_once(count);
  }
}

void ranges() {
  for (const int64_t count : {0, 1, 5, 31, 32, 33, 1000}) {
    for (const int64_t grain : {0, 1, 10, 2000}) {
      std::vector<int> done(count);
      parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
        CHECK(begin < end && (end == count || end - begin >= grain));
        for (int64_t i = begin; i < end; ++i) ++done[i];
      });
      for (const int times : done) CHECK(times == 1);
    }
  }
}

// Later pieces wait for earlier ones, in two stages.
void countdowns() {
  for (int i = 0; i < 500; ++i) {
    int first[5] = {}, second[3] = {};
    Countdown firsts(5), seconds(3);
    std::atomic<int> thirds{0};
    parallel_pieces(12, [&](int64_t piece) {
      if (piece < 5) {
        const Countdown::Piece counted(firsts);
        if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // who waits falls asleep
        first[piece] = 1;
      } else if (piece < 8) {
        firsts.wait();
        const Countdown::Piece counted(seconds);
        second[piece - 5] = first[0] + first[1] + first[2] + first[3] + first[4];
      } else {
        firsts.wait();
        seconds.wait();
        if (second[0] + second[1] + second[2] == 15) ++thirds;
      }
    });
    CHECK(thirds == 4);
  }
}

void exceptions() {
  for (int i = 0; i < 300; ++i) {
    Countdown some(4);
    std::string said;
    try {
      parallel_pieces(100, [&](int64_t piece) {
        if (piece < 4) {
          const Countdown::Piece counted(some);
          if (piece == i % 4) throw std::runtime_error("piece " + std::to_string(piece));
        } else {
          some.wait();
        }
      });
    } catch (const std::runtime_error& error) {
      said = error.what();
    }
    CHECK(said == "piece " + std::to_string(i % 4));
    each_once(10);
  }
}

void nested() {
  CHECK(parallel_threads() == 8);
  std::atomic<int> inner{0};
  parallel_pieces(20, [&](int64_t) {
    CHECK(parallel_threads() == 1);
    const auto here = std::this_thread::get_id();
    parallel_pieces(10, [&](int64_t) {
      CHECK(std::this_thread::get_id() == here);
      ++inner;
    });
    CHECK(parallel_threads() == 1);
  });
  CHECK(inner == 200);
  at::in_region = true;
  CHECK(parallel_threads() == 1);
  const auto here = std::this_thread::get_id();
  parallel_pieces(10, [&](int64_t) { CHECK(std::this_thread::get_id() == here); });
  at::in_region = false;
  CHECK(parallel_threads() == 8);
}

// More calls at once than the pool has places for.
void callers() {
  std::vector<std::thread> all;
  for (int t = 0; t < 40; ++t) {
    all.emplace_back([t] {
      for (int i = 0; i < 300; ++i) each_once(1 + (t + i) % 9);
    });
  }
  for (std::thread& thread : all) thread.join();
}

// The caller does it all where nobody comes: the only thread of the pool is held by another call.
void alone() {
  at::num_threads = 2;
  std::atomic<bool> held{false}, go{false};
  std::thread other([&] {
    parallel_pieces(2, [&](int64_t) {
      held = true;
      while (!go) std::this_thread::yield();
    });
  });
  while (!held) std::this_thread::yield();
  each_once(100);
  go = true;
  other.join();
}

// A child starts a pool of its own; its parent's goes on.
void forks() {
  each_once(100);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      for (int j = 0; j < 20; ++j) each_once(100);
      std::exit(0);
    }
    each_once(100);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

// Ends while threads of the pool spin, and while they sleep.
void ends() {
  each_once(100);
}
void ends_late() {
  each_once(100);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

const struct {
  const char* name;
  void (*run)();
} kCases[] = {{"pieces", pieces}, {"ranges", ranges},      {"countdowns", countdowns}, {"exceptions", exceptions},
              {"nested", nested}, {"callers", callers},    {"alone", alone},           {"forks", forks},
              {"ends", ends},     {"ends_late", ends_late}};

}  // namespace

int main(int, char** arguments) {
  for (const auto& each : kCases) {
    if (std::strcmp(each.name, arguments[1]) == 0) return each.run(), 0;
  }
  return 2;
}
