// Runs a grid on one thread of the host: block after block, each CUDA thread a fibre.
//
// A fibre runs until it waits (for its block, for lanes of its warp) or returns; then the next in order runs.
// Whoever reads what another thread has not yet written therefore reads the poison, or what was there
// before, in one of the two orders. Fibres switch without a system call, and outlive blocks and launches: a
// block in which nobody waits runs on one of them. This file alone is compiled without sanitizers: what it
// does to stacks is no business of theirs beyond being told.
#include "cuda_runtime.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace cuda_host {
namespace {

// ---- fibres ----

struct Fibre {
  void* registers[5] = {};  // __builtin_setjmp's
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

// Setting and jumping are functions of their own, as GCC asks.
__attribute__((noinline)) void go(Fibre* to) { __builtin_longjmp(to->registers, 1); }
__attribute__((noinline)) void go(const ucontext_t* to) { setcontext(to); }

template <typename To>
__attribute__((noinline)) void set_and_go(Fibre* from, To* to) {
  if (__builtin_setjmp(from->registers) == 0) go(to);
}

// `begin`: where the fibre begins, if it has not yet run.
void switch_to(Fibre* from, Fibre* to, const ucontext_t* begin = nullptr) {
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
  begin == nullptr ? set_and_go(from, to) : set_and_go(from, begin);
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

Fibre scheduler;  // the stack that launch was called on

// ---- a block ----

struct Thread {
  uint3 index;
  Fibre* fibre = nullptr;
  bool exited = false;

  const char* waits_in = nullptr;  // the operation; null: can run
  unsigned mask = 0;               // of lanes waited for; 0: the block
  int source = 0;
  uint64_t value = 0;
  Exchanged got = {};
  int votes = 0;
};

std::vector<Thread> threads;
Thread* current;
const std::function<void()>* body;
std::unique_ptr<unsigned char[]> shared;

std::string place(const uint3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

std::string hex(unsigned mask) {
  char text[11];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_host: block %s: %s\n", place(blockIdx).c_str(), what.c_str());
  __sanitizer_print_stack_trace();
  std::fflush(nullptr);
  std::_Exit(1);
}

// Names, since a literal has an address in every file that has it.
bool same(const Thread& a, const Thread& b) {
  if (a.mask != b.mask || (a.waits_in == nullptr) != (b.waits_in == nullptr)) return false;
  return a.waits_in == b.waits_in || std::strcmp(a.waits_in, b.waits_in) == 0;
}

std::string describe(const Thread& thread) {
  std::string text = "thread " + place(thread.index);
  if (thread.exited) return text + " has returned";
  text += std::string(" is in ") + thread.waits_in;
  return thread.mask == 0 ? text : text + " with mask " + hex(thread.mask);
}

void run_threads() {  // what every fibre does for ever, a thread each time it is taken from `idle`
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  for (;;) {
    (*body)();
    current->exited = true;
    switch_to(current->fibre, &scheduler);
  }
}

std::vector<Fibre*> idle;

void start(Thread& thread) {
  if (!idle.empty()) {
    thread.fibre = idle.back();
    idle.pop_back();
    return switch_to(&scheduler, thread.fibre);
  }
  constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;  // 64 KB: the largest page
  char* memory = static_cast<char*>(
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) fail("no memory for a stack");
  thread.fibre = new Fibre{.stack = memory + kGuard, .stack_bytes = kStack};
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = memory + kGuard;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, run_threads, 0);
  switch_to(&scheduler, thread.fibre, &context);
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  if (thread.fibre == nullptr) {
    start(thread);
  } else {
    switch_to(&scheduler, thread.fibre);
  }
  if (thread.exited) idle.push_back(thread.fibre);
}

void wait(const char* operation, unsigned mask) {
  current->waits_in = operation;
  current->mask = mask;
  switch_to(current->fibre, &scheduler);
}

// f(0 ... n - 1) in the order of the run
template <typename F>
void in_order(int n, const F& f) {
  for (int k = 0; k < n; ++k) f(descending ? n - 1 - k : k);
}

struct Warp {
  Thread* lanes;
  int size;

  bool run() const {
    bool any = false;
    in_order(size, [&](int lane) {
      Thread& thread = lanes[lane];
      if (thread.exited || thread.waits_in != nullptr) return;
      resume(thread);
      any = true;
    });
    return any;
  }

  // Lets go every group of lanes that is complete; a lane that has returned is not waited for.
  void complete() const {
    for (int lane = 0; lane < size; ++lane) {
      if (!lanes[lane].exited && lanes[lane].mask != 0 && complete(lanes[lane], lane))
        finish(lanes[lane].mask);
    }
  }

 private:
  template <typename F>
  void each(unsigned mask, const F& f) const {
    for (int lane = 0; lane < size; ++lane) {
      if ((mask >> lane & 1) != 0 && !lanes[lane].exited) f(lanes[lane]);
    }
  }

  bool complete(const Thread& first, int lane) const {
    bool all = true;
    each(first.mask, [&](const Thread& other) {
      if (same(first, other)) return;
      if ((other.mask >> lane & 1) != 0) {
        fail(describe(first) + ", " + describe(other) + ": each waits for the other");
      }
      all = false;
    });
    return all;
  }

  void finish(unsigned mask) const {
    unsigned nonzero = 0;
    each(mask, [&](const Thread& from) { nonzero |= unsigned{from.value != 0} << (&from - lanes); });
    each(mask, [&](Thread& to) {
      if (to.source < 0 || to.source >= size || (mask >> to.source & 1) == 0 || lanes[to.source].exited) {
        fail(describe(to) + ": it reads lane " + std::to_string(to.source) + ", which takes no part");
      }
      to.got = {lanes[to.source].value, nonzero};
    });
    each(mask, [](Thread& thread) { thread.waits_in = nullptr, thread.mask = 0; });
  }
};

void finish_barrier() {
  const Thread* first = nullptr;
  int votes = 0;
  for (const Thread& thread : threads) {
    if (thread.exited) continue;
    if (first == nullptr) first = &thread;
    if (thread.mask != 0 || !same(thread, *first)) {
      fail("deadlock: " + describe(*first) + ", " + describe(thread));
    }
    votes += thread.value != 0;
  }
  for (Thread& thread : threads) {
    thread.waits_in = nullptr;
    thread.votes = votes;
  }
}

void run_block() {
  const dim3 size = blockDim;
  threads.clear();
  for (unsigned k = 0; k < size.x * size.y * size.z; ++k) {
    threads.push_back({.index = {k % size.x, k / size.x % size.y, k / size.x / size.y}});
  }
  const int count = static_cast<int>(threads.size());
  const auto alive = [](const Thread& thread) { return !thread.exited; };
  while (std::any_of(threads.begin(), threads.end(), alive)) {
    in_order((count + warpSize - 1) / warpSize, [&](int k) {
      const Warp warp{&threads[k * warpSize], std::min(warpSize, count - k * warpSize)};
      while (warp.run()) warp.complete();
    });
    finish_barrier();
  }
}

// ---- launching ----

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> most_shared;  // bytes, where a kernel has asked for more than 48 KB

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || block.z > 64 || uint64_t{grid.x} * grid.y * grid.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = most_shared.find(kernel);
  const size_t most = asked == most_shared.end() ? 48 << 10 : asked->second;
  return config.dynamicSmemBytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

unsigned char* dynamic_shared() { return shared.get(); }

int lane() { return static_cast<int>((current - threads.data()) % warpSize); }

void fail(const char* operation, const char* what) {
  fail("thread " + place(threadIdx) + " in " + operation + ": " + what);
}

int barrier(const char* operation, bool predicate) {
  current->value = predicate;
  wait(operation, 0);
  return current->votes;
}

Exchanged exchange(const char* operation, unsigned mask, uint64_t value, int source) {
  if ((mask >> lane() & 1) == 0) {
    fail(operation, ("its own lane is not in the mask " + hex(mask)).c_str());
  }
  current->value = value;
  current->source = source;
  wait(operation, mask);
  return current->got;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > 227 << 10) return last_error = cudaErrorInvalidValue;
  most_shared[kernel] = value;
  return cudaSuccess;
}

cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  if (const cudaError_t error = check(config, kernel); error != cudaSuccess) return last_error = error;
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  shared.reset(new unsigned char[config.dynamicSmemBytes]);
  in_order(static_cast<int>(gridDim.x * gridDim.y * gridDim.z), [&](int k) {
    const auto block = static_cast<unsigned>(k);
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
    std::memset(shared.get(), 0xff, config.dynamicSmemBytes);
    run_block();
  });
  shared.reset();
  return cudaSuccess;
}

}  // namespace cuda_host

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }
