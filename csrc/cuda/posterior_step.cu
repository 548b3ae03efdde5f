// One row of a sampler's table in one launch, in place or not:
//
//   x0     = clip(p x + q out)
//   x_next = a x0 + b x + c out + d x0_prev + s noise,   s = x_from_noise exp(log_variance / 2)
//
// x, noise, x0_prev, x_next, x0 (B, C, ...) contiguous, float32, bfloat16 or float16; out (B, C or 2C, ...)
// of the same dtype or a half beside float32, contiguous or channels_last, read as it lies. Computed in
// float32, rounded once. Fused: the clip, the history, the learned variance and the drawing of the noise.
// Reads x, out, and what the row uses of x0_prev, noise and the variance (an operand whose coefficient is 0
// is not read); writes x_next, and x0 if asked for. With noise drawn inside and a float32 x beside a bfloat16
// out: 4 + 2 bytes read and 4 written an element.
//
// The row and whom the noise is for are read on the device. A sample whose row is outside the table, or needs
// an operand that is not given, is NaN.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "noise.cuh"
#include "span.cuh"

namespace ddpm_fast::cuda {
namespace {

struct Row {
  float x0_from_x, x0_from_out;
  float x_from_x0, x_from_x, x_from_out, x_from_x0_prev, x_from_noise;
};

struct Range {  // of a learned log variance
  float min_log, max_log;
};

__device__ __forceinline__ bool inside(const PosteriorStep& args, int64_t i) {
  return i >= 0 && i < args.rows;
}

__device__ __forceinline__ Row row_of(const PosteriorStep& args, int64_t i) {
  if (!inside(args, i)) return {kNan, kNan, kNan, kNan, kNan, kNan, kNan};
  const float* row = args.table + i * args.columns;
  return {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
}

__device__ __forceinline__ Range range_of(const PosteriorStep& args, int64_t i) {
  if (!inside(args, i)) return {kNan, kNan};
  const float* row = args.table + i * args.columns;
  return {row[7], row[8]};
}

// exp(log_variance / 2), where the network says `v` between the row's two logarithms: -1 is the least
__device__ __forceinline__ float deviation(const Range& range, float v) {
  const float fraction = __fmul_rn(__fadd_rn(v, 1.0f), 0.5f);
  const float log_variance =
      __fmaf_rn(fraction, range.max_log, __fmul_rn(__fsub_rn(1.0f, fraction), range.min_log));
  return __expf(__fmul_rn(0.5f, log_variance));
}

template <int E>
__device__ __forceinline__ void add(float by, const float (&operand)[E], float (&x_next)[E]) {
#pragma unroll
  for (int k = 0; k < E; ++k) x_next[k] = __fmaf_rn(by, operand[k], x_next[k]);
}

// Each fma is spelled out: left to the compiler, noise drawn and noise given could round differently.
// `variance`: from an element of out to its variance's.
template <typename T, typename Out, int E, bool kWideX, bool kWideOut>
__global__ void __launch_bounds__(kThreads)
    posterior_step_kernel(PosteriorStep args, int64_t variance, Spans spans) {
  const Place at = place<E>(spans);
  if (at.left <= 0) return;
  const int64_t base = at.sample * spans.elements + at.first;
  const auto like_x = [&](const void* from, float (&values)[E]) {
    load_span<kWideX>(static_cast<const T*>(from) + base, at.left, values);
  };
  const auto of_out = [&](const Out* from, float (&values)[E]) {
    from += at.sample * args.out_elements;
    if constexpr (kWideOut) {
      load_span<true>(from + at.first, at.left, values);
    } else {
      load_walk(from, Walk(args.out_layout, at.first), at.left, values);
    }
  };

  float x[E], out[E], x0[E], x_next[E];
  like_x(args.x, x);
  of_out(static_cast<const Out*>(args.out), out);
  const int64_t i = of_sample<int64_t>(args.i, at.sample);
  const Row row = row_of(args, i);
  const float high = args.clip_each != nullptr ? args.clip_each[at.sample] : args.clip, low = -high;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    float clean = __fmaf_rn(row.x0_from_x, x[k], __fmul_rn(row.x0_from_out, out[k]));
    clean = clean < low ? low : clean;  // in this order NaN stays
    clean = clean > high ? high : clean;
    x0[k] = clean;
    x_next[k] = __fmaf_rn(row.x_from_x0, clean, __fmul_rn(row.x_from_x, x[k]));
  }
  if (row.x_from_out != 0) add(row.x_from_out, out, x_next);
  if (row.x_from_x0_prev != 0) {
    float x0_prev[E];
    fill(x0_prev, kNan);
    if (args.x0_prev != nullptr) like_x(args.x0_prev, x0_prev);
    add(row.x_from_x0_prev, x0_prev, x_next);
  }
  if (row.x_from_noise != 0) {
    float noise[E];
    fill(noise, kNan);
    if (args.noise != nullptr) {
      like_x(args.noise, noise);
    } else if (args.seed.data != nullptr) {
      const Draw draw = {
          of_sample<uint64_t>(args.seed, at.sample), of_sample<uint64_t>(args.image_index, at.sample),
          stream_step(kStreamStep, i)};
      normal(draw, at.first, noise);
    }
    if (args.columns == 9) {
      float v[E];
      of_out(static_cast<const Out*>(args.out) + variance, v);
      const Range range = range_of(args, i);
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const float scale = __fmul_rn(row.x_from_noise, deviation(range, v[k]));
        x_next[k] = __fmaf_rn(scale, noise[k], x_next[k]);
      }
    } else {
      add(row.x_from_noise, noise, x_next);
    }
  }
  if (args.x0 != nullptr) store_span<kWideX>(static_cast<T*>(args.x0) + base, at.left, x0);
  store_span<kWideX>(static_cast<T*>(args.x_next) + base, at.left, x_next);
}

// 16 bytes an access where everything like x allows it, and for out where it is contiguous too.
template <typename T, typename Out>
void launch_typed(const PosteriorStep& args, int64_t variance, bool contiguous_out, cudaStream_t stream) {
  constexpr int kBoth = std::max(kWide<T>, kWide<Out>);
  const bool wide_x = aligned(args.x) && aligned(args.noise) && aligned(args.x0_prev) &&
                      aligned(args.x_next) && aligned(args.x0) && args.elements % kWide<T> == 0;
  const bool wide_out = contiguous_out && aligned(args.out) && args.elements % kBoth == 0;
  const auto with = [&](int per_thread, auto* kernel) {
    const Spans spans = spans_of(args.batch, args.elements, per_thread);
    launch(kernel, spans.grid, spans.threads, 0, stream, args, variance, spans);
  };
  if (wide_x && wide_out) {
    with(kBoth, posterior_step_kernel<T, Out, kBoth, true, true>);
  } else if (wide_x) {
    with(kWide<T>, posterior_step_kernel<T, Out, kWide<T>, true, false>);
  } else {
    with(4, posterior_step_kernel<T, Out, 4, false, false>);
  }
}

}  // namespace

void posterior_step(const PosteriorStep& given, cudaStream_t stream) {
  if (given.batch * given.elements == 0) return;
  PosteriorStep args = given;
  const bool contiguous = given.out_layout.channels == 0;
  args.out_layout = dense(given.out_layout, given.elements);
  const int64_t variance = contiguous ? given.elements : given.elements / given.out_layout.pixels;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.out_dtype == args.dtype) {
      launch_typed<T, T>(args, variance, contiguous, stream);
    } else if constexpr (std::is_same_v<T, float>) {
      if (args.out_dtype == Dtype::kBFloat16)
        launch_typed<T, __nv_bfloat16>(args, variance, contiguous, stream);
      if (args.out_dtype == Dtype::kHalf) launch_typed<T, __half>(args, variance, contiguous, stream);
    }
  });
}

}  // namespace ddpm_fast::cuda
