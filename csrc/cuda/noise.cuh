// Counter noise on the device, one definition for every kernel that draws.
//
//   r = Philox4x32-10 (../philox.h);  u = (r + 0.5) 2^-32
//   z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1);  z2, z3 from u2, u3
//
// The words are bit-exact with reference.philox4x32_10, the normals within 1e-6 of reference.counter_normal.
// Each fma is spelled out: left to the compiler, two kernels could draw normals that differ in the last bit.
// About 20 integer and 20 float operations an element, no memory, no branch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../philox.h"

namespace ddpm_fast::cuda {

// (0, 1]: rounding carries the last 128 of the 2^32 words up to 1, where the radius is 0.
__device__ __forceinline__ float uniform(uint32_t r) {
  return __fmul_rn(__fadd_rn(static_cast<float>(r), 0.5f), 0x1p-32f);
}

// Sine and cosine of 2 pi u, within 1e-7: the reduction to an eighth of a turn is exact in turns, and so
// needs none of sincosf's slow path, which spills.
__device__ __forceinline__ void sincos_turns(float u, float& sine, float& cosine) {
  const int quarter = static_cast<int>(__fmaf_rn(4.0f, u, 0.5f));
  const float angle = __fmul_rn(__fmaf_rn(u, 4.0f, -static_cast<float>(quarter)), 1.5707963267948966f);
  const float square = __fmul_rn(angle, angle);
  float s = __fmaf_rn(square, -1.9515295891e-4f, 8.3321608736e-3f);
  s = __fmaf_rn(__fmul_rn(__fmaf_rn(s, square, -1.6666654611e-1f), square), angle, angle);
  float c = __fmaf_rn(square, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = __fmaf_rn(__fmaf_rn(c, square, 4.166664568298827e-2f), square, -0.5f);
  c = __fmaf_rn(c, square, 1.0f);
  const bool odd = (quarter & 1) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if ((quarter & 2) != 0) sine = -sine;
  if (((quarter + 1) & 2) != 0) cosine = -cosine;
}

__device__ __forceinline__ float square_root(float x) {
#ifdef __CUDA_ARCH__
  float root;  // one instruction, 2^-23; sqrtf's last half bit would cost a call
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

__device__ __forceinline__ void box_muller(uint32_t r0, uint32_t r1, float& z0, float& z1) {
  const float radius = square_root(__fmul_rn(-2.0f, logf(uniform(r0))));
  float sine, cosine;
  sincos_turns(uniform(r1), sine, cosine);
  z0 = __fmul_rn(radius, cosine);
  z1 = __fmul_rn(radius, sine);
}

struct Draw {  // whose noise, and what for
  uint64_t seed, image;
  uint32_t stream_step;
};

// The normals of elements first, ..., first + E - 1 of the image; first is a multiple of 4. A counter is
// computed once, by the thread that keeps its four normals.
template <int E>
__device__ __forceinline__ void normal(const Draw& draw, int64_t first, float (&z)[E]) {
  static_assert(E % 4 == 0);
#pragma unroll
  for (int k = 0; k < E; k += 4) {
    uint32_t c[4] = {
        static_cast<uint32_t>((first + k) / 4), draw.stream_step, static_cast<uint32_t>(draw.image),
        static_cast<uint32_t>(draw.image >> 32)};
    ddpm_fast::philox4x32_10(c, static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32));
    box_muller(c[0], c[1], z[k], z[k + 1]);
    box_muller(c[2], c[3], z[k + 2], z[k + 3]);
  }
}

}  // namespace ddpm_fast::cuda
