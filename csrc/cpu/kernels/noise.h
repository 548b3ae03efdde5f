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

// The normals of these counters, quad after quad.
inline void draw(Two (&c)[4], const Keys& keys, float* out) {
  for (const PhiloxKey& key : keys.of) philox_round(c, key, TwoMulHiLo{});
  for (int k = 0; k < 2; ++k) {
    Float z[4];
    box_muller(c[0].of[k], c[1].of[k], z[0], z[1]);
    box_muller(c[2].of[k], c[3].of[k], z[2], z[3]);
    store_quads(out + k * (kDrawn / 2), z);
  }
}

inline void draw(const Keys& keys, uint32_t stream_step, uint64_t image, uint32_t quad, float* out) {
  const auto all = [](uint32_t value) { return Two{{UInt{} + value, UInt{} + value}}; };
  const UInt quads = quads_of_lanes() + quad;
  Two c[4] = {
      {{quads, quads + kLanes}},
      all(stream_step),
      all(static_cast<uint32_t>(image)),
      all(static_cast<uint32_t>(image >> 32))};
  draw(c, keys, out);
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

// The same of many small images, a lane's quad of whichever image comes next.
void normal_each(
    uint64_t seed, uint32_t stream_step, const int64_t* images, int64_t count, int64_t elements, float* out) {
  constexpr int64_t kQuads = 2 * kLanes;
  const int64_t quads = (elements + 3) / 4;  // of an image
  const UInt steps = UInt{} + stream_step;
  const Keys keys(seed);
  const UInt quad_of = quads_of_lanes();
  int64_t image = 0, quad = 0, written = 0;
  float* to = out;
  for (int64_t done = 0; done < count * quads; done += kQuads) {
    uint32_t of_quad[kQuads] = {}, low[kQuads] = {}, high[kQuads] = {};
    for (int64_t k = 0; k < kQuads && image < count; ++k) {
      of_quad[k] = static_cast<uint32_t>(quad);
      low[k] = static_cast<uint32_t>(images[image]);
      high[k] = static_cast<uint32_t>(static_cast<uint64_t>(images[image]) >> 32);
      if (++quad == quads) quad = 0, ++image;
    }
    Two c[4] = {};
    for (int k = 0; k < 2; ++k) {
      c[1].of[k] = steps;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t from = k * kLanes + quad_of[lane];
        c[0].of[k][lane] = of_quad[from], c[2].of[k][lane] = low[from], c[3].of[k][lane] = high[from];
      }
    }
    float drawn[kDrawn];
    draw(c, keys, drawn);
    for (int64_t k = 0; k < kQuads && done + k < count * quads; ++k) {
      const int64_t left = elements - written, n = left < 4 ? left : 4;
      for (int64_t e = 0; e < n; ++e) to[e] = drawn[4 * k + e];
      to += n, written = written + n == elements ? 0 : written + n;
    }
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
