// Two normals from two words (Box & Muller 1958): z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1), with
// u = (r + 0.5) 2^-32. In float32, to 1e-6 of the definition in float64.
#pragma once

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

inline Float uniform(UInt r) { return __builtin_convertvector(r, Float) * 0x1p-32f + 0x1p-33f; }

#if defined(__AVX512F__)

// -2 ln x for 0 < x <= 1, each to its own last digits, since the root of a small one is taken: x = m 2^e with
// m in [3/4, 3/2), and m is a tabled 1 / r times 1 + f, |f| <= 1/16; next to 1 the table has 1 itself.
inline Float minus_2_log(Float x) {
  const Float m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const Float e = Float(_mm512_getexp_ps(x)) - Float(_mm512_getexp_ps(m));
  const __m512i slot = _mm512_srli_epi32(_mm512_castps_si512(x), 19);  // four bits of the mantissa
  const __m512 reciprocals = _mm512_setr_ps(
      1.0f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
      1.30612242f, 1.25490201f, 1.20754719f, 1.16363633f, 1.12280703f, 1.08474576f, 1.04918027f, 1.0f);
  const __m512 logs = _mm512_setr_ps(  // 2 ln r
      0.0f, -0.179224306f, -0.290363971f, -0.395651461f, -0.495672402f, -0.590928433f, -0.681853126f, -0.768823461f, 0.53412553f, 0.454114972f, 0.377182369f, 0.303099733f, 0.231663646f, 0.162691283f, 0.0960183266f, 0.0f);
  const Float f = m * Float(_mm512_permutexvar_ps(slot, reciprocals)) - 1.0f;
  Float p = broadcast(4.7559398e-1f);  // -2 ln(1 + f) = -2 f + f^2 p, minimax to 5e-8 relative
  p = p * f - 6.6694848e-1f;
  p = p * f + 1.000023037f;
  const Float rest = e * -1.38629436f + Float(_mm512_permutexvar_ps(slot, logs));
  return p * (f * f) + (rest - 2.0f * f);
}

// sine and cosine of 2 pi u for u in [0, 1]: the quadrant comes off exactly.
inline void sincos_turns(Float u, Float& sine, Float& cosine) {
  const __m512i quadrant = _mm512_castps_si512(u + 0.25f * kRoundMagic);  // in the two last bits
  const Float v = _mm512_reduce_ps(u, 2 << 4);                            // u - round(4 u) / 4
  const Float square = v * v;
  Float s = broadcast(-75.402068f);
  s = s * square + 81.592554f;
  s = s * square - 41.341663f;
  s = (s * square + 6.2831853f) * v;
  Float c = broadcast(-83.665918f);
  c = c * square + 64.923229f;
  c = c * square - 19.7391673f;
  c = c * square + 1.0f;
  const __mmask16 odd = _mm512_test_epi32_mask(quadrant, _mm512_set1_epi32(1));
  const auto flip = [](__m512 x, __m512i bits) {  // by the last bit but one
    const __m512i top = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(bits, 30), top, 0x78));
  };
  sine = flip(_mm512_mask_blend_ps(odd, s, c), quadrant);
  cosine = flip(_mm512_mask_blend_ps(odd, c, s), _mm512_add_epi32(quadrant, _mm512_set1_epi32(1)));
}

#else

// ln x for normal x > 0 (Cephes logf).
inline Float log(Float x) {
  Int bits = bit_cast<Int>(x);
  const Int exponent_of_root = (bits - 0x3F3504F3) >> 23;  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  bits -= exponent_of_root << 23;
  const Float e = __builtin_convertvector(exponent_of_root, Float);
  const Float m = bit_cast<Float>(bits) - 1.0f;
  Float p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Float square = m * m;
  Float y = p * m * square - e * 2.12194440e-4f;
  y = y - 0.5f * square;
  return m + y + e * 0.693359375f;
}

inline Float minus_2_log(Float x) { return -2.0f * log(x); }

// sine and cosine of 2 pi u for u in [0, 1]: the quadrant comes off exactly.
inline void sincos_turns(Float u, Float& sine, Float& cosine) {
  const Float shifted = 4.0f * u + kRoundMagic;
  const Int quadrant = bit_cast<Int>(shifted);
  const Float angle = (4.0f * u - (shifted - kRoundMagic)) * 1.57079632679f;
  const Float square = angle * angle;
  Float s = broadcast(-1.9515295891e-4f);
  s = s * square + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  s = s * square * angle + angle;
  Float c = broadcast(2.443315711809948e-5f);
  c = c * square - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * (square * square) - 0.5f * square + 1.0f;
  const Int odd = -(quadrant & 1);
  const Int sine_sign = (quadrant & 2) << 30;
  const Int cosine_sign = ((quadrant + 1) & 2) << 30;
  const Int s_bits = bit_cast<Int>(s), c_bits = bit_cast<Int>(c);
  sine = bit_cast<Float>(((odd & c_bits) | (~odd & s_bits)) ^ sine_sign);
  cosine = bit_cast<Float>(((odd & s_bits) | (~odd & c_bits)) ^ cosine_sign);
}

#endif

inline void box_muller(UInt r0, UInt r1, Float& z0, Float& z1) {
  const Float radius = sqrt(minus_2_log(uniform(r0)));
  Float sine, cosine;
  sincos_turns(uniform(r1), sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace
}  // namespace ddpm_fast::cpu
