// Counter noise: Philox4x32-10, then Box-Muller in float32.
//
//   u = (r + 0.5) 2^-32;  z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1);  z2, z3 from u2, u3
//
// Writes 4 bytes an element and reads none; a register holds the counters of kLanes quads of elements.
#pragma once

#include "../../philox.h"
#include "box_muller.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

// Two registers at a time: each of Philox's ten rounds waits for the one before, and the other register's
// fill the wait.
struct Two {
  UInt of[2];
};

inline Two xor_of(const Two& a, const Two& b, uint32_t key) {
  return {xor_of(a.of[0], b.of[0], key), xor_of(a.of[1], b.of[1], key)};
}

struct TwoMulHiLo {
  void operator()(uint32_t a, const Two& b, Two& hi, Two& lo) const {
    for (int k = 0; k < 2; ++k) VectorMulHiLo{}(a, b.of[k], hi.of[k], lo.of[k]);
  }
};

constexpr int64_t kDrawn = 8 * kLanes;  // normals at a time: four of a quad in each lane

struct Keys {  // of all rounds: read from memory they cost nothing, made from round to round they do
  PhiloxKey of[kPhiloxRounds];

  explicit Keys(uint64_t seed) {
    of[0] = {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
    for (int round = 1; round < kPhiloxRounds; ++round) of[round] = of[round - 1].next();
  }
};

inline void draw(const Keys& keys, uint32_t stream_step, uint64_t image, uint32_t quad, float* out) {
  const auto all = [](uint32_t value) { return Two{{UInt{} + value, UInt{} + value}}; };
  const UInt quads = quads_of_lanes() + quad;
  Two c[4] = {
      {{quads, quads + kLanes}},
      all(stream_step),
      all(static_cast<uint32_t>(image)),
      all(static_cast<uint32_t>(image >> 32))};
  for (const PhiloxKey& key : keys.of) philox_round(c, key, TwoMulHiLo{});
  for (int k = 0; k < 2; ++k) {
    Float z[4];
    box_muller(c[0].of[k], c[1].of[k], z[0], z[1]);
    box_muller(c[2].of[k], c[3].of[k], z[2], z[3]);
    store_quads(out + k * (kDrawn / 2), z);
  }
}

void normal(uint64_t seed, uint32_t stream_step, uint64_t image, int64_t begin, float* out, int64_t n) {
  const Keys keys(seed);
  for (int64_t done = 0; done < n; done += kDrawn) {
    const uint32_t quad = static_cast<uint32_t>((begin + done) / 4);
    if (n - done >= kDrawn) {
      draw(keys, stream_step, image, quad, out + done);
    } else {
      float rest[kDrawn];
      draw(keys, stream_step, image, quad, rest);
      std::memcpy(out + done, rest, (n - done) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
