// The forward process in one launch:
//
//   x_t = table[t, 0] x0 + table[t, 1] noise
//
// x0, noise, x_t (B, ...) float32, bfloat16 or float16, all in one layout; computed in float32, rounded once.
// With s bytes an element: 2 s read and s written with the noise given; s read and 2 s written with the noise
// drawn, which is rounded before it is used, so that both give the same x_t. t is read on the device: a
// sample whose t is outside the table is NaN.

#include "device.cuh"
#include "kernels.h"
#include "noise.cuh"
#include "span.cuh"

namespace ddpm_fast::cuda {
namespace {

struct Weights {
  float x0, noise;
};

__device__ __forceinline__ Weights weights(const float* table, int64_t rows, int64_t t) {
  if (t < 0 || t >= rows) return {kNan, kNan};
  return {table[2 * t], table[2 * t + 1]};
}

__device__ __forceinline__ float mix(const Weights& by, float x0, float noise) {
  return __fmaf_rn(by.x0, x0, __fmul_rn(by.noise, noise));  // spelled out: both kernels round alike
}

template <typename T, int E, bool kWideAccess>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(QSample args, Spans spans) {
  const Place at = place<E>(spans);
  if (at.left <= 0) return;
  const int64_t base = at.sample * spans.elements + at.first;
  float x0[E], noise[E];
  load_span<kWideAccess>(static_cast<const T*>(args.x0) + base, at.left, x0);
  load_span<kWideAccess>(static_cast<const T*>(args.noise) + base, at.left, noise);
  const Weights by = weights(args.table, args.rows, of_sample<int64_t>(args.t, at.sample));
#pragma unroll
  for (int k = 0; k < E; ++k) x0[k] = mix(by, x0[k], noise[k]);
  store_span<kWideAccess>(static_cast<T*>(args.x_t) + base, at.left, x0);
}

template <typename T, int E, bool kWideAccess>
__global__ void __launch_bounds__(kThreads) q_sample_counter_kernel(QSampleCounter args, Spans spans) {
  const Place at = place<E>(spans);
  if (at.left <= 0) return;
  const int64_t sample = at.sample * spans.elements;
  const T* x0_at = static_cast<const T*>(args.x0) + sample;
  T *noise_at = static_cast<T*>(args.noise) + sample, *x_t_at = static_cast<T*>(args.x_t) + sample;
  float x0[E], noise[E];
  if constexpr (kWideAccess) {
    load_span<true>(x0_at + at.first, at.left, x0);
  } else {
    load_walk(x0_at, Walk(args.layout, at.first), at.left, x0);
  }
  const Weights by = weights(args.table, args.rows, of_sample<int64_t>(args.t, at.sample));
  const Draw draw = {
      of_sample<uint64_t>(args.seed, at.sample), of_sample<uint64_t>(args.image_index, at.sample),
      stream_step(kStreamTraining, 0)};
  normal(draw, at.first, noise);
#pragma unroll
  for (int k = 0; k < E; ++k) {
    noise[k] = to_float(from_float<T>(noise[k]));
    x0[k] = mix(by, x0[k], noise[k]);
  }
  if constexpr (kWideAccess) {
    store_span<true>(noise_at + at.first, at.left, noise);
    store_span<true>(x_t_at + at.first, at.left, x0);
  } else {
    store_walk(noise_at, Walk(args.layout, at.first), at.left, noise);
    store_walk(x_t_at, Walk(args.layout, at.first), at.left, x0);
  }
}

}  // namespace

void q_sample(const QSample& args, cudaStream_t stream) {
  if (args.batch * args.elements == 0) return;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int E = kWide<T>;
    const bool wide = args.elements % E == 0 && aligned(args.x0) && aligned(args.noise) && aligned(args.x_t);
    const Spans spans = spans_of(args.batch, args.elements, wide ? E : 4);
    launch(
        wide ? q_sample_kernel<T, E, true> : q_sample_kernel<T, 4, false>, spans.grid, spans.threads, 0,
        stream, args, spans);
  });
}

void q_sample_counter(const QSampleCounter& given, cudaStream_t stream) {
  if (given.batch * given.elements == 0) return;
  QSampleCounter args = given;
  args.layout = dense(given.layout, given.elements);
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int E = kWide<T>;
    const bool wide = given.layout.channels == 0 && args.elements % E == 0 && aligned(args.x0) &&
                      aligned(args.noise) && aligned(args.x_t);
    const Spans spans = spans_of(args.batch, args.elements, wide ? E : 4);
    launch(
        wide ? q_sample_counter_kernel<T, E, true> : q_sample_counter_kernel<T, 4, false>, spans.grid,
        spans.threads, 0, stream, args, spans);
  });
}

}  // namespace ddpm_fast::cuda
