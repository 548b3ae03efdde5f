// The gradient of `group_norm_silu` to x, weight, bias, add, scale and shift.
//
// With h = x + add - mean, n = h rstd, y as in the forward, g = grad act'(y) and gain = weight (1 + scale)
// rstd, over the pixels of a channel and, E, the elements of a group:
//
//     grad_x = gain g + q h + r = gain g - n rstd E[gain g h] - E[gain g];  grad_add = sum of grad_x
//     A = sum of g, N = sum of g n:  grad_shift = A,  grad_scale = weight N + bias A
//     and of each sample:  grad_bias = (1 + scale) A,  grad_weight = (1 + scale) N
//
// Nothing but the inputs was kept. One read of x for the statistics, one of x and grad for the sums, one of
// both and one write for grad_x: from a cache where a group (contiguous) or an image (channels last) fits it.
// Sums are float32 over few values and float64 from there.
#pragma once

#include "group_norm_silu.h"

namespace ddpm_fast::cpu {
namespace {

// grad act'(y) for y = h gain + offset; sigmoid(y) and 1 - sigmoid(y) each to its own last digits. Past the
// bound the slope is 0, or 1, but for what no float32 sum would see.
template <bool kSilu>
inline Float before_silu(Float grad, Float h, Float gain, Float offset) {
  if constexpr (!kSilu) return grad;
  const Float y = at_most(at_least(h * gain + offset, -kExpBound), kExpBound);
  const Float power = exp<-1>(y), gate = divide(broadcast(1.0f), 1.0f + power);
  return grad * (gate + (y * gate) * (power * gate));
}

// Of each channel: its sums of g, of g h and of h; the lift, which is what h = x - center lacks of
// x + add - mean; and q and r, by channel and by slot.
struct GradientRows {
  double *g, *gh, *h;
  float *lift, *q, *r, *slots_q, *slots_r;
  Folded folded;

  GradientRows(float* scratch, int64_t padded, const Folded& by_channel)
      : g(reinterpret_cast<double*>(scratch)),
        gh(g + padded),
        h(gh + padded),
        lift(scratch + 6 * padded),
        q(lift + padded),
        r(q + padded),
        slots_q(r + padded),
        slots_r(slots_q + padded),
        folded(by_channel) {}
};

// `fold` of channels [from, to), which keeps the lift.
inline void fold_and_lift(
    const GroupNormArgs& args, int64_t from, int64_t to, const Folded& folded, float* lift) {
  const Folded here = {folded.center + from, folded.gain + from, folded.offset + from};
  if (args.add) subtract(here.center, here.offset, args.add + from, to - from);
  for (int64_t c = from; c < to; ++c) lift[c] = -folded.offset[c];
  GroupNormArgs rest = args;
  rest.add = nullptr;
  fold(rest, from, to - from, here);
}

// From the sums over the pixels of a group, channels [from, to): its q and r, and its channels' gradients.
inline void through_norm(
    const GroupNormArgs& args, const GroupNormGradients& gradients, int64_t from, int64_t to, int64_t pixels,
    double rstd, const GradientRows& rows) {
  const auto film = [&](int64_t c) { return args.scale ? 1.0 + args.scale[c] : 1.0; };
  const auto weight = [&](int64_t c) { return args.weight ? args.weight[c] : 1.0; };
  double mean_g = 0, mean_gh = 0;
  for (int64_t c = from; c < to; ++c) {
    const double gain = rstd * film(c) * weight(c);
    rows.gh[c] += rows.lift[c] * rows.g[c];
    mean_g += gain * rows.g[c];
    mean_gh += gain * rows.gh[c];
  }
  const double elements = static_cast<double>((to - from) * pixels);
  mean_g /= elements, mean_gh /= elements;
  const double q = -rstd * rstd * mean_gh;
  for (int64_t c = from; c < to; ++c) {
    rows.q[c] = static_cast<float>(q);
    rows.r[c] = static_cast<float>(q * rows.lift[c] - mean_g);
    for (float* value : {rows.q + c, rows.r + c}) {  // one NaN, which store_pair keeps
      if (*value != *value) *value = std::numeric_limits<float>::quiet_NaN();
    }
    const double a = rows.g[c], n = rstd * rows.gh[c];
    if (gradients.weight) gradients.weight[c] = static_cast<float>(film(c) * n);
    if (gradients.bias) gradients.bias[c] = static_cast<float>(film(c) * a);
    if (gradients.add) {
      const double all = static_cast<double>(pixels), h = rows.h[c] + all * rows.lift[c];
      gradients.add[c] = static_cast<float>(rstd * film(c) * weight(c) * a + q * h - all * mean_g);
    }
    if (gradients.scale) {
      const double bias = args.bias ? args.bias[c] : 0;
      gradients.scale[c] = static_cast<float>(weight(c) * n + bias * a);
    }
    if (gradients.shift) gradients.shift[c] = static_cast<float>(a);
  }
}

struct GradientSums {
  Float g = {}, gh = {}, h = {};

  void take(Float gradient, Float value) {
    g += gradient;
    gh += gradient * value;
    h += value;
  }
};

// float32's g waits in grad_x; that of a half would be rounded there, and is worked out twice.
template <bool kSilu, typename T>
constexpr bool kKeeps = kSilu && std::is_same_v<T, float>;

// So many values are summed in float32. The gradient to `add` is what large sums leave of each other.
constexpr int64_t kSumRows = 16;

// ---- channels last ----

// Sums of up to kSumRows rows over a pair's channels, added to those of the rows before.
template <bool kSilu, bool kPartial, typename T>
inline void gradient_sums(
    const T* grad, const T* x, T* g, int64_t rows, int64_t stride, int64_t lanes, const Folded& by,
    bool first, double* const (&sums)[3]) {
  const Float center[2] = {load(by.center), load(by.center + kLanes)};
  const Float gain[2] = {load(by.gain), load(by.gain + kLanes)};
  const Float offset[2] = {load(by.offset), load(by.offset + kLanes)};
  GradientSums total[2];
  for (int64_t k = 0; k < rows; ++k, grad += stride, x += stride, g += stride) {
    const Pair v = kPartial ? load_pair(x, lanes) : load_pair(x);
    Pair d = kPartial ? load_pair(grad, lanes) : load_pair(grad);
    const Float a = v.a - center[0], b = v.b - center[1];
    d = {before_silu<kSilu>(d.a, a, gain[0], offset[0]), before_silu<kSilu>(d.b, b, gain[1], offset[1])};
    total[0].take(d.a, a), total[1].take(d.b, b);
    if constexpr (kKeeps<kSilu, T>) kPartial ? store_pair(g, d, lanes) : store_pair(g, d);
  }
  float block[3][kPairLanes];
  for (int k = 0; k < 2; ++k) {
    store(block[0] + k * kLanes, total[k].g);
    store(block[1] + k * kLanes, total[k].gh);
    store(block[2] + k * kLanes, total[k].h);
  }
  for (int s = 0; s < 3; ++s) {
    for (int k = 0; k < kPairLanes; ++k) sums[s][k] = block[s][k] + (first ? 0.0 : sums[s][k]);
  }
}

template <bool kSilu, typename T>
inline void rows_of_gradients(
    const T* grad, const T* x, T* grad_x, int64_t pixels, int64_t stride, int64_t channels, const Folded& by,
    const float* q, const float* r) {
  const auto pair = [&](Pair d, Pair v, int64_t c) {
    const auto one = [&](Float grad, Float x, int64_t at) {
      const Float h = x - load(by.center + at), gain = load(by.gain + at);
      const Float g = before_silu<kSilu>(grad, h, gain, load(by.offset + at));
      return gain * g + (load(q + at) * h + load(r + at));
    };
    return Pair{one(d.a, v.a, c), one(d.b, v.b, c + kLanes)};
  };
  for (int64_t k = 0; k < pixels; ++k, grad += stride, x += stride, grad_x += stride) {
    int64_t c = 0;
    for (; c + kPairLanes <= channels; c += kPairLanes) {
      store_pair(grad_x + c, pair(load_pair(grad + c), load_pair(x + c), c));
    }
    const int64_t left = channels - c;
    if (left > 0) store_pair(grad_x + c, pair(load_pair(grad + c, left), load_pair(x + c, left), c), left);
  }
}

template <bool kSilu, typename T>
void backward_nhwc(
    const T* grad, const T* x, T* grad_x, int64_t pixels, int64_t stride, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, const GroupNormGradients& gradients,
    float* scratch) {
  const int64_t padded = padded_channels(channels);
  const Slots<T> by_slot = {channels, channels};
  const Rows statistics(scratch, padded, by_slot.in_order());
  const Folded &folded = statistics.folded, &slots = statistics.slots;
  const GradientRows rows(scratch + group_norm_scratch(channels), padded, folded);
  const GroupNormSources source = {{{x, channels, stride}, {}}};
  statistics_nhwc(source, pixels, channels_per_group, args, by_slot, statistics);
  fold_and_lift(args, 0, channels, folded, rows.lift);
  by_slot.place(folded.center, slots.center);
  by_slot.place(folded.gain, slots.gain);
  by_slot.place(folded.offset, slots.offset);

  for (int64_t row = 0; row < pixels; row += kSumRows) {
    const int64_t some = std::min(pixels - row, kSumRows);
    for (int64_t c = 0; c < channels; c += kPairLanes) {
      const Folded by = {slots.center + c, slots.gain + c, slots.offset + c};
      double* const sums[3] = {rows.g + c, rows.gh + c, rows.h + c};
      const int64_t at = row * stride + c, lanes = channels - c;
      if (lanes >= kPairLanes) {
        gradient_sums<kSilu, false>(grad + at, x + at, grad_x + at, some, stride, lanes, by, row == 0, sums);
      } else {
        gradient_sums<kSilu, true>(grad + at, x + at, grad_x + at, some, stride, lanes, by, row == 0, sums);
      }
    }
  }
  for (double* sums : {rows.g, rows.gh, rows.h}) by_slot.take(sums, sums);
  for (int64_t c = 0; c < channels; c += channels_per_group) {
    const double rstd = statistics.squares[c / channels_per_group];
    through_norm(args, gradients, c, c + channels_per_group, pixels, rstd, rows);
  }
  const auto in_slots = [&](const float* from, float* to) {
    by_slot.place(from, to);
    return by_slot.in_order() ? from : to;
  };
  const float* q = in_slots(rows.q, rows.slots_q);
  const float* r = in_slots(rows.r, rows.slots_r);
  constexpr bool kKept = kKeeps<kSilu, T>;
  rows_of_gradients<kSilu && !kKept>(kKept ? grad_x : grad, x, grad_x, pixels, stride, channels, slots, q, r);
}

// ---- channels first ----

template <bool kSilu, typename T>
inline void gradient_sums_of_span(
    const T* grad, const T* x, T* g, int64_t n, float center, float gain, float offset, double (&sums)[3]) {
  const Float m = broadcast(center), w = broadcast(gain), b = broadcast(offset);
  for (double& s : sums) s = 0;
  while (n > 0) {
    const int64_t some = std::min(n, kSumRows * kPairLanes);
    GradientSums total[2];
    const auto take = [&](GradientSums& to, Float d, Float h) {
      const Float before = before_silu<kSilu>(d, h, w, b);
      to.take(before, h);
      return before;
    };
    constexpr bool kKeep = kKeeps<kSilu, T>;
    int64_t k = 0;
    for (; k + kPairLanes <= some; k += kPairLanes) {
      const Pair v = load_pair(x + k), d = load_pair(grad + k);
      const Pair before = {take(total[0], d.a, v.a - m), take(total[1], d.b, v.b - m)};
      if constexpr (kKeep) store_pair(g + k, before);
    }
    for (; k + kLanes <= some; k += kLanes) {
      const Float before = take(total[0], load(grad + k), load(x + k) - m);
      if constexpr (kKeep) store(g + k, before);
    }
    if (k < some) {
      const int64_t left = some - k;
      const Float before = take(total[1], load(grad + k, left), keep(load(x + k, left) - m, left));
      if constexpr (kKeep) store(g + k, before, left);
    }
    sums[0] += sum(total[0].g + total[1].g);
    sums[1] += sum(total[0].gh + total[1].gh);
    sums[2] += sum(total[0].h + total[1].h);
    grad += some, x += some, g += some, n -= some;
  }
}

template <bool kSilu, typename T>
inline void span_of_gradients(
    const T* grad, const T* x, T* grad_x, int64_t n, float center, float gain, float offset, float q,
    float r) {
  const Float m = broadcast(center), w = broadcast(gain), b = broadcast(offset);
  const Float by_h = broadcast(q), plus = broadcast(r);
  const auto one = [&](Float d, Float v) {
    const Float h = v - m;
    return w * before_silu<kSilu>(d, h, w, b) + (by_h * h + plus);
  };
  int64_t k = 0;
  for (; k + kPairLanes <= n; k += kPairLanes) {
    const Pair v = load_pair(x + k), d = load_pair(grad + k);
    store_pair(grad_x + k, {one(d.a, v.a), one(d.b, v.b)});
  }
  for (; k + kLanes <= n; k += kLanes) store(grad_x + k, one(load(grad + k), load(x + k)));
  if (k < n) store(grad_x + k, one(load(grad + k, n - k), load(x + k, n - k)), n - k);
}

// A group at a time, so that it is still in a near cache when its gradient is written.
template <bool kSilu, typename T>
void backward_nchw(
    const T* grad, const T* x, T* grad_x, int64_t pixels, int64_t channels_per_group, int64_t groups,
    const GroupNormArgs& args, const GroupNormGradients& gradients, float* scratch) {
  const int64_t channels = groups * channels_per_group, padded = padded_channels(channels);
  const Folded folded = Rows(scratch, padded, /*in_order=*/true).folded;
  const GradientRows rows(scratch + group_norm_scratch(channels), padded, folded);
  const Channels<T> planes = {x, nullptr, channels, pixels};
  const int64_t at_once =
      std::clamp<int64_t>(kBlockFloats / (channels_per_group * pixels), 1, kGroups) * channels_per_group;
  for (int64_t begin = 0; begin < channels; begin += at_once) {
    const int64_t end = std::min(begin + at_once, channels), count = (end - begin) / channels_per_group;
    double means[kGroups], rstds[kGroups];
    float reach[kGroups];
    statistics_nchw(planes, args.add, begin, count, channels_per_group, args.eps, means, rstds, reach);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t from = begin + g * channels_per_group;
      const float center = static_cast<float>(means[g]);
      fill(folded.center + from, channels_per_group, center);
      fill(folded.offset + from, channels_per_group, static_cast<float>(means[g] - center));
      fill(folded.gain + from, channels_per_group, static_cast<float>(rstds[g]));
    }
    fold_and_lift(args, begin, end, folded, rows.lift);
    for (int64_t c = begin; c < end; ++c) {
      double sums[3];
      gradient_sums_of_span<kSilu>(
          grad + c * pixels, planes[c], grad_x + c * pixels, pixels, folded.center[c], folded.gain[c],
          folded.offset[c], sums);
      rows.g[c] = sums[0], rows.gh[c] = sums[1], rows.h[c] = sums[2];
    }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t from = begin + g * channels_per_group;
      through_norm(args, gradients, from, from + channels_per_group, pixels, rstds[g], rows);
    }
    for (int64_t c = begin; c < end; ++c) {
      constexpr bool kKept = kKeeps<kSilu, T>;
      span_of_gradients<kSilu && !kKept>(
          (kKept ? grad_x : grad) + c * pixels, planes[c], grad_x + c * pixels, pixels, folded.center[c],
          folded.gain[c], folded.offset[c], rows.q[c], rows.r[c]);
    }
  }
}

template <typename T>
void group_norm_backward_nhwc(
    const T* grad, const T* x, T* grad_x, int64_t pixels, int64_t stride, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, const GroupNormGradients& gradients,
    float* scratch) {
  const auto run = args.silu ? backward_nhwc<true, T> : backward_nhwc<false, T>;
  run(grad, x, grad_x, pixels, stride, channels, channels_per_group, args, gradients, scratch);
}

template <typename T>
void group_norm_backward_nchw(
    const T* grad, const T* x, T* grad_x, int64_t pixels, int64_t channels_per_group, int64_t groups,
    const GroupNormArgs& args, const GroupNormGradients& gradients, float* scratch) {
  const auto run = args.silu ? backward_nchw<true, T> : backward_nchw<false, T>;
  run(grad, x, grad_x, pixels, channels_per_group, groups, args, gradients, scratch);
}

}  // namespace
}  // namespace ddpm_fast::cpu
