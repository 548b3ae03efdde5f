#include "team.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ddpm_fast {
namespace {

constexpr int kSpins = 1000;  // 50 us: then whoever has work may have the processor

template <typename Condition>
void wait_until(const Condition& holds) {
  for (int spins = 0; !holds(); ++spins) {
    if (spins >= kSpins) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

class Team {
 public:
  explicit Team(int64_t threads) : parts_(threads) {}

  int64_t threads() const { return static_cast<int64_t>(parts_.size()); }

  // By the first thread, which leads.
  void run(int64_t begin, int64_t end, int64_t part, Loop loop, const void* body) {
    begin_ = begin, end_ = end, part_ = part, loop_ = loop, body_ = body;
    const int64_t parts = (end - begin + part - 1) / part;
    const uint64_t round = (round_.load(std::memory_order_relaxed) / kMostParts + 1) * kMostParts + parts;
    round_.store(round, std::memory_order_release);
    take_parts(round, 0);
    for (int64_t k = 0; k < parts; ++k) {
      wait_until([&] { return parts_[k].done.load(std::memory_order_acquire) == round; });
    }
    if (raised_) std::rethrow_exception(std::exchange(raised_, nullptr));
  }

  // By any other, until `dismiss`; one that has not come by then is not waited for.
  void join(int64_t thread) {
    for (uint64_t seen = 0, round = 0;; seen = round) {
      wait_until([&] { return (round = round_.load(std::memory_order_acquire)) != seen; });
      if (round == kOver) return;
      take_parts(round, thread);
    }
  }

  void dismiss() { round_.store(kOver, std::memory_order_release); }

 private:
  static constexpr uint64_t kMostParts = 1 << 16, kOver = ~uint64_t{0};

  struct alignas(64) Part {
    std::atomic<uint64_t> taken = 0, done = 0;  // in which round
  };

  // The parts of a round are all taken before it ends: one that comes late takes none of the next round's.
  void take_parts(uint64_t round, int64_t thread) {
    const auto parts = static_cast<int64_t>(round % kMostParts);
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t own = (thread + k) % parts;
      std::atomic<uint64_t>& taken = parts_[own].taken;
      uint64_t before = taken.load(std::memory_order_relaxed);
      if (before >= round || !taken.compare_exchange_strong(before, round, std::memory_order_acq_rel))
        continue;
      run_part(begin_ + own * part_);
      parts_[own].done.store(round, std::memory_order_release);
    }
  }

  void run_part(int64_t first) {
    try {
      loop_(body_, first, std::min(first + part_, end_));
    } catch (...) {
      const std::lock_guard lock(raising_);
      raised_ = std::current_exception();
    }
  }

  int64_t begin_ = 0, end_ = 0, part_ = 0;
  Loop loop_ = nullptr;
  const void* body_ = nullptr;
  std::mutex raising_;
  std::exception_ptr raised_;
  std::vector<Part> parts_;
  alignas(64) std::atomic<uint64_t> round_ = 0;  // its number, and how many parts it has
};

thread_local Team* led = nullptr;

// Sets `led` as long as it lives.
class Leads {
 public:
  explicit Leads(Team* team) : before_(std::exchange(led, team)) {}
  ~Leads() { led = before_; }
  Leads(const Leads&) = delete;
  Leads& operator=(const Leads&) = delete;

 private:
  Team* const before_;
};

}  // namespace

bool run_by_team(int64_t begin, int64_t end, int64_t grain, Loop loop, const void* body) {
  Team* const team = led;
  if (team == nullptr || begin >= end) return false;
  const Leads none(nullptr);  // a loop within a loop is run by who comes to it
  const int64_t count = end - begin;
  const int64_t parts = std::min(team->threads(), grain > 0 ? (count + grain - 1) / grain : count);
  if (parts == 1) {
    loop(body, begin, end);
  } else {
    team->run(begin, end, (count + parts - 1) / parts, loop, body);
  }
  return true;
}

void as_a_team(const std::function<void()>& work) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads == 1 || led != nullptr) return work();
  Team team(threads);
  std::exception_ptr raised;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    if (first > 0) return team.join(first);
    const Leads own(&team);
    try {
      work();
    } catch (...) {
      raised = std::current_exception();
    }
    team.dismiss();
  });
  if (raised) std::rethrow_exception(raised);
}

}  // namespace ddpm_fast
