// y = keep(e) x / (1 - p), element e in the order of memory kept where 16 random bits are at least p 2^16.
//
// Philox4x32-10 at the counter e / 8: word e % 4, its low half for e % 8 < 4, else the high one. Nothing is
// stored: the gradient draws again. Reads and writes one value an element.
#pragma once

#include "convert.h"
#include "noise.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int64_t kDropped = 16 * kLanes;  // elements at a time: eight of a counter in each lane of two

inline void keep_factors(const Keys& keys, uint32_t counter, uint32_t threshold, Float scale, float* out) {
  const UInt quads = quads_of_lanes() + counter;
  Two c[4] = {{{quads, quads + kLanes}}, {}, {}, {}};
  c[1] = {{UInt{} + stream_step(kStreamDropout, 0), UInt{} + stream_step(kStreamDropout, 0)}};
  for (const PhiloxKey& key : keys.of) philox_round(c, key, TwoMulHiLo{});
  for (int k = 0; k < 2; ++k) {
    Float low[4], high[4];
    for (int word = 0; word < 4; ++word) {
      const UInt bits = c[word].of[k];
      low[word] = (bits & 0xFFFFu) >= threshold ? scale : Float{};
      high[word] = (bits >> 16) >= threshold ? scale : Float{};
    }
    float quads[2][4 * kLanes];
    store_quads(quads[0], low);
    store_quads(quads[1], high);
    for (int at = 0; at < kLanes; ++at, out += 8) {
      std::memcpy(out, quads[0] + 4 * at, 4 * sizeof(float));
      std::memcpy(out + 4, quads[1] + 4 * at, 4 * sizeof(float));
    }
  }
}

// Elements [begin, begin + n) of a tensor, of which x and y are the first; begin is a multiple of 1024.
void dropout(
    Dtype dtype, uint64_t seed, int64_t threshold, int64_t begin, const void* x, void* y, int64_t n) {
  const int64_t size = dtype == Dtype::kFloat ? 4 : 2;
  const Keys keys(seed);
  const Float scale = broadcast(static_cast<float>(1 / (1 - static_cast<double>(threshold) / 65536)));
  for (int64_t done = 0; done < n; done += kDropped) {
    const int64_t some = n - done < kDropped ? n - done : kDropped;
    float factors[kDropped], values[kDropped];
    keep_factors(
        keys, static_cast<uint32_t>((begin + done) / 8), static_cast<uint32_t>(threshold), scale, factors);
    load_any(dtype, static_cast<const char*>(x) + done * size, values, some);
    for (int64_t k = 0; k < kDropped; ++k) values[k] *= factors[k];
    store_any(dtype, values, static_cast<char*>(y) + done * size, some);
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
