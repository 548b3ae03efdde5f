// Memory that a thread keeps for its next call: fresh pages would cost more than the work in them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ddpm_fast {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Asks for huge pages: a packed weight is read once a call, from beyond the caches, and a quarter of that
// went into looking up small pages. Where the system refuses, they stay small.
inline void in_huge_pages(float* memory, int64_t count) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + count * sizeof(float);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first + kHugePage <= end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)count;
#endif
}

class Workspace {
 public:
  float* floats(int64_t count) {
    if (count > count_) {
      constexpr int64_t kFloats = kHugePage / sizeof(float);
      count = (count + kFloats - 1) / kFloats * kFloats;
      memory_.reset();  // the old first
      count_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, count * sizeof(float))));
      if (memory_ == nullptr) throw std::bad_alloc();
      in_huge_pages(memory_.get(), count);
      count_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t count_ = 0;
};

// A thread's, for whichever op it runs: what is laid out to be multiplied, and what a kernel needs besides.
inline Workspace& for_operands() {
  thread_local Workspace workspace;
  return workspace;
}

inline Workspace& for_scratch() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace ddpm_fast
