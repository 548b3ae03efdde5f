// Counter noise: Philox4x32-10, then Box-Muller in float32.
//
//   u = (r + 0.5) 2^-32;  z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1);  z2, z3 from u2, u3
//
// Writes 4 bytes an element and reads none; a register holds kLanes consecutive counters.
#pragma once

#include "../../philox.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

inline Float uniform(UInt r) { return (__builtin_convertvector(r, Float) + 0.5f) * 0x1p-32f; }

inline void box_muller(UInt r0, UInt r1, Float& z0, Float& z1) {
  const Float radius = sqrt(-2.0f * log(uniform(r0)));
  Float sine, cosine;
  sincos_turns(uniform(r1), sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

void normal(uint64_t seed, uint32_t stream_step, uint64_t image, int64_t begin, float* out, int64_t n) {
  UInt lane{};
  for (int k = 0; k < kLanes; ++k) lane[k] = static_cast<uint32_t>(k);
  for (int64_t done = 0; done < n; done += 4 * kLanes) {
    const uint32_t quad = static_cast<uint32_t>((begin + done) / 4);
    UInt c[4] = {
        lane + quad, UInt{} + stream_step, UInt{} + static_cast<uint32_t>(image),
        UInt{} + static_cast<uint32_t>(image >> 32)};
    philox4x32_10(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), VectorMulHiLo{});
    Float z[4];
    box_muller(c[0], c[1], z[0], z[1]);
    box_muller(c[2], c[3], z[2], z[3]);

    float lanes[4][kLanes];
    for (int k = 0; k < 4; ++k) store(lanes[k], z[k]);
    float block[4 * kLanes];
    const int64_t count = n - done < 4 * kLanes ? n - done : 4 * kLanes;
    float* to = count == 4 * kLanes ? out + done : block;
    for (int l = 0; l < kLanes; ++l) {
      for (int k = 0; k < 4; ++k) to[4 * l + k] = lanes[k][l];
    }
    if (to == block) std::memcpy(out + done, block, count * sizeof(float));
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
