// Counter noise: Philox4x32-10, then Box-Muller in float32.
//
//   u = (r + 0.5) 2^-32;  z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1);  z2, z3 from u2, u3
//
// Writes 4 bytes an element and reads none; a register holds the counters of kLanes quads of elements.
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

// Two registers at a time: each of Philox's ten rounds waits for the one before, and the other register's
// fill the wait.
struct Two {
  UInt of[2];
};

inline Two operator^(const Two& x, const Two& y) { return {x.of[0] ^ y.of[0], x.of[1] ^ y.of[1]}; }
inline Two operator^(const Two& x, uint32_t y) { return {x.of[0] ^ y, x.of[1] ^ y}; }

struct TwoMulHiLo {
  void operator()(uint32_t a, const Two& b, Two& hi, Two& lo) const {
    for (int k = 0; k < 2; ++k) VectorMulHiLo{}(a, b.of[k], hi.of[k], lo.of[k]);
  }
};

// first, first + 1, ..., in store_quads' order of lanes.
inline Two counters(uint32_t first) {
  UInt quads;
  for (int lane = 0; lane < kLanes; ++lane) quads[lane] = first + quad_of(lane);
  return {{quads, quads + kLanes}};
}

constexpr int64_t kDrawn = 8 * kLanes;  // normals at a time: four of a quad in each lane

inline void draw(uint64_t seed, uint32_t stream_step, uint64_t image, uint32_t quad, float* out) {
  const auto all = [](uint32_t value) { return Two{{UInt{} + value, UInt{} + value}}; };
  Two c[4] = {
      counters(quad), all(stream_step), all(static_cast<uint32_t>(image)),
      all(static_cast<uint32_t>(image >> 32))};
  philox4x32_10(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), TwoMulHiLo{});
  for (int k = 0; k < 2; ++k) {
    Float z[4];
    box_muller(c[0].of[k], c[1].of[k], z[0], z[1]);
    box_muller(c[2].of[k], c[3].of[k], z[2], z[3]);
    store_quads(out + k * (kDrawn / 2), z);
  }
}

void normal(uint64_t seed, uint32_t stream_step, uint64_t image, int64_t begin, float* out, int64_t n) {
  for (int64_t done = 0; done < n; done += kDrawn) {
    const uint32_t quad = static_cast<uint32_t>((begin + done) / 4);
    if (n - done >= kDrawn) {
      draw(seed, stream_step, image, quad, out + done);
    } else {
      float rest[kDrawn];
      draw(seed, stream_step, image, quad, rest);
      std::memcpy(out + done, rest, (n - done) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
