// A register of floats, and the few functions on it that the kernels need, in the compiler's vector
// extension.
//
// Everything has internal linkage: this header is compiled once for each instruction set, and the linker
// must not take one set's code for another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC diagnostic push  // gcc 12 warns of what its own intrinsics leave undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace ddpm_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UInt __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShort __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Float broadcast(float value) { return value - Float{}; }

inline Float load(const float* from) {
  Float to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline void store(float* to, Float from) { std::memcpy(to, &from, sizeof(from)); }

inline UInt load_shorts(const uint16_t* from) {
  UShort bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, UInt);
}

inline void store_shorts(uint16_t* to, UInt from) {
  const UShort bits = __builtin_convertvector(from, UShort);
  std::memcpy(to, &bits, sizeof(bits));
}

inline Float load(const BFloat16* from) { return bit_cast<Float>(load_shorts(&from->bits) << 16); }

inline void store(BFloat16* to, Float from) {  // round to nearest even; NaN stays NaN
  const UInt bits = bit_cast<UInt>(from);
  const UInt rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  store_shorts(&to->bits, (from == from) ? rounded : UInt{} + 0x7FC0);
}

inline Float load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  // The exponent is rebased by a multiplication, which also normalises subnormals; infinity and NaN are put
  // back.
  const UInt bits = load_shorts(&from->bits);
  const UInt magnitude = (bits & 0x7FFF) << 13;
  const Float scaled = bit_cast<Float>(magnitude) * 0x1p112f;
  const UInt finite = bit_cast<UInt>(scaled);
  const UInt special = magnitude | 0x7F800000;
  return bit_cast<Float>((magnitude >= (0x7C00u << 13) ? special : finite) | (bits & 0x8000) << 16);
#endif
}

inline void store(Half* to, Float from) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
#else
  const UInt bits = bit_cast<UInt>(from);
  const UInt sign = (bits >> 16) & 0x8000;
  const UInt magnitude = bits & 0x7FFFFFFF;
  const UInt normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lets the addition itself shift a subnormal into place, rounded.
  const UInt subnormal = bit_cast<UInt>(bit_cast<Float>(magnitude) + 0.5f) - 0x3F000000;
  UInt half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477FF000 ? UInt{} + 0x7C00 : half;
  half = magnitude > 0x7F800000 ? UInt{} + 0x7E00 : half;
  store_shorts(&to->bits, half | sign);
#endif
}

// The first n < kLanes elements; the rest of the register is zero.
template <typename T>
inline Float load(const T* from, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(first, from);
#endif
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, n * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store(T* to, Float from, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, first, from);
#endif
  T buffer[kLanes];
  store(buffer, from);
  std::memcpy(to, buffer, n * sizeof(T));
}

// Two registers of consecutive elements, in whatever order is the cheapest to unpack: see `slot_of`.
struct Pair {
  Float a, b;
};

template <typename T>
inline Pair load_pair(const T* from) {
  return {load(from), load(from + kLanes)};
}

template <typename T>
inline void store_pair(T* to, Pair from) {
  store(to, from.a);
  store(to + kLanes, from.b);
}

// Rounded to nearest, of a half's two neighbours to either: for what is not exact to the last bit anyway.
template <typename T>
inline void store_pair_near(T* to, Pair from) {
  store_pair(to, from);
}

// Where a pair holds element k, and which element it holds at k.
template <typename T>
constexpr int slot_of(int k) {
  return k;
}

template <typename T>
constexpr int element_at(int k) {
  return k;
}

// bfloat16: the even elements, then the odd ones, each a shift or a mask away from a float.
inline Pair load_pair(const BFloat16* from) {
  UInt bits;
  std::memcpy(&bits, from, sizeof(bits));
  return {bit_cast<Float>(bits << 16), bit_cast<Float>(bits & 0xFFFF0000)};
}

// Rounds to nearest even. NaN stays if its lower half is zero, as it is in what comes of bfloat16 or of
// arithmetic.
inline void store_pair(BFloat16* to, Pair from) {
  const UInt even = bit_cast<UInt>(from.a), odd = bit_cast<UInt>(from.b);
  const UInt low = (even + 0x7FFF + ((even >> 16) & 1)) >> 16;
  const UInt high = (odd + 0x7FFF + ((odd >> 16) & 1)) & 0xFFFF0000;
  const UInt both = low | high;
  std::memcpy(to, &both, sizeof(both));
}

inline void store_pair_near(BFloat16* to, Pair from) {
  const UInt low = (bit_cast<UInt>(from.a) + 0x8000) >> 16;
  const UInt both = low | ((bit_cast<UInt>(from.b) + 0x8000) & 0xFFFF0000);
  std::memcpy(to, &both, sizeof(both));
}

template <>
constexpr int slot_of<BFloat16>(int k) {
  return k % 2 * kLanes + k / 2;
}

template <>
constexpr int element_at<BFloat16>(int k) {
  return k % kLanes * 2 + k / kLanes;
}

// The first half of the lanes of `first`, the second of `second`.
inline Float blend_halves(Float first, Float second) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(0xFF00, first, second);
#else
  Int lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return lane < kLanes / 2 ? first : second;
#endif
}

// The first n lanes, and in the rest something else.
inline Float keep(Float x, int64_t n, float rest = 0) {
  Int lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return lane < static_cast<int32_t>(n) ? x : broadcast(rest);
}

inline float sum(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
#endif
}

inline float largest(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int lane = 1; lane < kLanes; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
#endif
}

inline Float sqrt(Float x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

constexpr float kRoundMagic = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer in the low bits

// The larger and the smaller of x and a bound; NaN stays.
inline Float at_least(Float x, float bound) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(bound), x);
#else
  return x < bound ? broadcast(bound) : x;
#endif
}

inline Float at_most(Float x, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), x);
#else
  return x > bound ? broadcast(bound) : x;
#endif
}

constexpr float kExpBound = 87.0f;  // e^x is a normal float, below 2^127, for |x| up to it

// e^x for k = 1, e^-x for k = -1, to 2 ulp, for |x| <= kExpBound.
template <int k>
inline Float exp(Float x) {
  constexpr float kLog2e = k * 1.44269504f;
  const Float shifted = x * kLog2e + kRoundMagic;
  const Float n = shifted - kRoundMagic;
  const Float r = x * kLog2e - n;  // 2^r by its minimax polynomial on [-1/2, 1/2], 9e-8 relative
  Float p = broadcast(1.3264724e-3f);
  p = p * r + 9.671513e-3f;
  p = p * r + 5.5507336e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.93147e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  // The integer sits in the magic number's low mantissa bits; shifting drops the rest of it.
  return bit_cast<Float>(bit_cast<Int>(p) + (bit_cast<Int>(shifted) << 23));
#endif
}

// x / y to 2 ulp for 1 <= y < 2^127. A division takes as long as all the rest of a SiLU; an estimate and a
// Newton step for it do not.
inline Float divide(Float x, Float y) {
#if defined(__AVX512F__)
  const Float r = _mm512_rcp14_ps(y);
  return x * (r + r * (1.0f - y * r));
#else
  return x / y;
#endif
}

inline UInt xor_of(UInt a, UInt b, uint32_t key) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), y = bit_cast<__m512i>(b);
  return bit_cast<UInt>(_mm512_ternarylogic_epi32(x, y, _mm512_set1_epi32(static_cast<int>(key)), 0x96));
#else
  return a ^ b ^ key;
#endif
}

struct VectorMulHiLo {
  void operator()(uint32_t a, UInt b, UInt& hi, UInt& lo) const {
#if defined(__AVX512F__)
    const __m512i k = _mm512_set1_epi32(static_cast<int>(a)), v = bit_cast<__m512i>(b);
    const __m512i even = _mm512_mul_epu32(v, k);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), k);
    const __m512i low = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    const __m512i high = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    hi = bit_cast<UInt>(_mm512_permutex2var_epi32(even, high, odd));
    lo = bit_cast<UInt>(_mm512_permutex2var_epi32(even, low, odd));
#elif defined(__AVX2__)
    const __m256i k = _mm256_set1_epi32(static_cast<int>(a)), v = bit_cast<__m256i>(b);
    const __m256i even = _mm256_mul_epu32(v, k);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), k);
    hi = bit_cast<UInt>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
    lo = bit_cast<UInt>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
    UInt high = {}, low = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t product = static_cast<uint64_t>(a) * b[lane];
      high[lane] = static_cast<uint32_t>(product >> 32);
      low[lane] = static_cast<uint32_t>(product);
    }
    hi = high, lo = low;
#endif
  }
};

// Lanes are numbered so that four registers, each of one element of kLanes quads, are stored by few shuffles:
// these are the lanes' quads.
inline UInt quads_of_lanes() {
  constexpr struct Quads {
    uint32_t of[kLanes];
    constexpr Quads() : of() {
      for (int lane = 0; lane < kLanes; ++lane) of[lane] = kLanes / 4 * (lane % 4) + lane / 4;
    }
  } kQuads;
  return bit_cast<UInt>(kQuads.of);
}

inline void store_quads(float* to, const Float (&z)[4]) {
#if defined(__AVX512F__)
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1])),
                ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3])),
                cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
  _mm512_storeu_pd(to, _mm512_unpacklo_pd(ab0, cd0));
  _mm512_storeu_pd(to + 16, _mm512_unpackhi_pd(ab0, cd0));
  _mm512_storeu_pd(to + 32, _mm512_unpacklo_pd(ab1, cd1));
  _mm512_storeu_pd(to + 48, _mm512_unpackhi_pd(ab1, cd1));
#elif defined(__AVX2__)
  const __m256 ab0 = _mm256_unpacklo_ps(z[0], z[1]), ab1 = _mm256_unpackhi_ps(z[0], z[1]);
  const __m256 cd0 = _mm256_unpacklo_ps(z[2], z[3]), cd1 = _mm256_unpackhi_ps(z[2], z[3]);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(ab0, cd0, 0x44));
  _mm256_storeu_ps(to + 8, _mm256_shuffle_ps(ab0, cd0, 0xEE));
  _mm256_storeu_ps(to + 16, _mm256_shuffle_ps(ab1, cd1, 0x44));
  _mm256_storeu_ps(to + 24, _mm256_shuffle_ps(ab1, cd1, 0xEE));
#else
  for (int l = 0; l < kLanes; ++l) {
    for (int k = 0; k < 4; ++k) to[4 * l + k] = z[k][l];
  }
#endif
}

}  // namespace
}  // namespace ddpm_fast::cpu
