// The counter noise, one definition for host and device.
//
//   r = Philox4x32-10(counter = (element / 4, stream << 28 | step, image low, image high), key = seed)
//
// Salmon et al. 2011, section 3.3. U is uint32_t, or a vector of them with its own Multiply.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DDPM_FAST_HOST_DEVICE __host__ __device__
#else
#define DDPM_FAST_HOST_DEVICE
#endif

namespace ddpm_fast {

enum Stream : uint32_t { kStreamXT = 0, kStreamStep = 1, kStreamTraining = 2, kStreamDropout = 3 };

DDPM_FAST_HOST_DEVICE inline uint32_t stream_step(int64_t stream, int64_t step) {
  return static_cast<uint32_t>(stream) << 28 | static_cast<uint32_t>(step);
}

struct MulHiLo {  // the two words of a 64-bit product
  DDPM_FAST_HOST_DEVICE void operator()(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
};

template <typename U>
DDPM_FAST_HOST_DEVICE inline U xor_of(const U& a, const U& b, uint32_t key) {
  return a ^ b ^ key;
}

struct PhiloxKey {  // of a round
  uint32_t of[2];

  DDPM_FAST_HOST_DEVICE PhiloxKey next() const { return {{of[0] + 0x9E3779B9u, of[1] + 0xBB67AE85u}}; }
};

constexpr int kPhiloxRounds = 10;

template <typename U, typename Multiply = MulHiLo>
DDPM_FAST_HOST_DEVICE inline void philox_round(U (&c)[4], const PhiloxKey& key, Multiply mul_hi_lo = {}) {
  U hi0, lo0, hi1, lo1;
  mul_hi_lo(0xD2511F53u, c[0], hi0, lo0);
  mul_hi_lo(0xCD9E8D57u, c[2], hi1, lo1);
  c[0] = xor_of(hi1, c[1], key.of[0]);
  c[1] = lo1;
  c[2] = xor_of(hi0, c[3], key.of[1]);
  c[3] = lo0;
}

template <typename U>
DDPM_FAST_HOST_DEVICE inline void philox4x32_10(U (&c)[4], uint32_t key0, uint32_t key1) {
  PhiloxKey key = {{key0, key1}};
  for (int round = 0; round < kPhiloxRounds; ++round, key = key.next()) philox_round(c, key);
}

}  // namespace ddpm_fast
