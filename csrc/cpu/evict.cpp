// For `ddpm_fast/tuning.py`, which calls it with ctypes: a layer finds its weights beyond the caches.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

namespace {

bool has_clflushopt() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 23));
}

// clflush, which every processor has, waits for each line: 20 times as long.
__attribute__((target("clflushopt"))) void flush(const char* data, const char* end) {
  constexpr uintptr_t kLine = 64;
  for (data -= reinterpret_cast<uintptr_t>(data) % kLine; data < end; data += kLine) {
    _mm_clflushopt(const_cast<char*>(data));
  }
  _mm_mfence();
}

}  // namespace
#endif

// Takes [data, data + bytes) out of every cache; false where no instruction does.
extern "C" __attribute__((visibility("default"))) bool ddpm_fast_evict(
    [[maybe_unused]] const char* data, [[maybe_unused]] size_t bytes) {
#if defined(__x86_64__)
  if (has_clflushopt()) {
    flush(data, data + bytes);
    return true;
  }
#endif
  return false;
}
