// y = silu((1 + scale) (weight norm(x + add) + bias) + shift), statistics over a group's channels and pixels.
//
// Fused: the time embedding before, affine, FiLM and SiLU after. One read for the statistics (each block of
// it twice, the second time from L1), one read and one write to apply. float32 arithmetic; the statistics of
// a block are taken about the block's own mean and merged in float64, so that a large mean cancels nowhere.
//
// x may be two tensors, its first channels in one and the rest in the other: [x, skip] without building it.
// A group's statistics merge from wherever its channels lie. Built it is where asked for, from what was read.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int64_t kBlockFloats = 4096;  // 16 KB: a block stays in L1 between its two passes

// Sums of values and of squares, about a shift that is the first block's mean.
struct Moments {
  double shift = 0, count = 0, sum = 0, squares = 0;

  // n values whose sum and sum of squares about `center` are s1 and s2
  void merge(double n, double center, double s1, double s2) {
    if (count == 0) shift = center;
    const double delta = center - shift;
    count += n;
    sum += s1 + n * delta;
    squares += s2 + delta * (2 * s1 + n * delta);
  }

  double mean() const { return shift + sum / count; }
  double variance() const {
    const double v = (squares - sum * sum / count) / count;
    return v < 0 ? 0 : v;  // NaN stays
  }
};

// y = silu((x - center) gain + offset), by channel: the mean comes off first, as a float, and what that float
// lacks of it is in the offset.
struct Folded {
  float *center, *gain, *offset;
};

// A group's statistics into its channels [0, channels), before the affine.
inline void fold_statistics(double mean, double rstd, const float* add, int64_t channels, const Folded& to) {
  for (int64_t c = 0; c < channels; ++c) {
    const double exact = mean - (add ? add[c] : 0.0f);
    to.center[c] = static_cast<float>(exact);
    to.offset[c] = static_cast<float>(to.center[c] - exact);
    to.gain[c] = static_cast<float>(rstd);
  }
}

inline void fold_affine(const GroupNormArgs& args, int64_t from, int64_t channels, const Folded& to) {
  if (args.weight) {
    for (int64_t c = 0; c < channels; ++c) to.gain[c] *= args.weight[from + c];
  }
  for (int64_t c = 0; c < channels; ++c) to.offset[c] *= to.gain[c];
  if (args.bias) {
    for (int64_t c = 0; c < channels; ++c) to.offset[c] += args.bias[from + c];
  }
  if (args.scale) {
    for (int64_t c = 0; c < channels; ++c) {
      to.gain[c] *= 1.0f + args.scale[from + c];
      to.offset[c] *= 1.0f + args.scale[from + c];
    }
  }
  if (args.shift) {
    for (int64_t c = 0; c < channels; ++c) to.offset[c] += args.shift[from + c];
  }
}

inline double reciprocal_root(double x) { return 1 / __builtin_sqrt(x); }

template <bool kSilu>
inline Float apply(Float x, Float center, Float gain, Float offset) {
  const Float y = (x - center) * gain + offset;
  if constexpr (kSilu) return silu(y);
  return y;
}

// ---- channels last: rows of channels ----

// Adds a block of rows to the moments of kTiles registers of channels (of the first `lanes` of one, if
// partial): sums and sums of squares about `shift`, which the first block sets to its mean.
template <int kTiles, bool kPartial, typename T>
inline void block_moments(
    const T* x, int64_t rows, int64_t stride, int64_t lanes, bool first, float* shift, double* sums,
    double* squares) {
  const auto value = [&](int64_t r, int k) {
    const T* at = x + r * stride + k * kLanes;
    if constexpr (kPartial) return load(at, lanes);
    return load(at);
  };
  Float total[kTiles] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kTiles; ++k) total[k] += value(r, k);
  }
  Float center[kTiles], s1[kTiles] = {}, s2[kTiles] = {};
  for (int k = 0; k < kTiles; ++k) center[k] = total[k] * (1.0f / static_cast<float>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kTiles; ++k) {
      const Float d = value(r, k) - center[k];
      s1[k] += d;
      s2[k] += d * d;
    }
  }
  float centers[kTiles * kLanes], s1s[kTiles * kLanes], s2s[kTiles * kLanes];
  for (int k = 0; k < kTiles; ++k) {
    store(centers + k * kLanes, center[k]);
    store(s1s + k * kLanes, s1[k]);
    store(s2s + k * kLanes, s2[k]);
  }
  const double n = static_cast<double>(rows);
  for (int c = 0; c < kTiles * kLanes; ++c) {
    if (first) shift[c] = centers[c], sums[c] = 0, squares[c] = 0;
    const double delta = static_cast<double>(centers[c]) - shift[c];
    sums[c] += s1s[c] + n * delta;
    squares[c] += s2s[c] + delta * (2.0 * s1s[c] + n * delta);
  }
}

// Sums, and sums of squares about `shift`, of each of a source's channels.
template <typename T>
inline void channel_moments(
    const GroupNormSource& source, int64_t pixels, float* shift, double* sums, double* squares) {
  const int64_t channels = source.channels, stride = source.stride;
  if (channels == 0) return;
  constexpr int kTiles = 4;
  const int64_t block = kBlockFloats / channels < 8 ? 8 : kBlockFloats / channels;
  for (int64_t r = 0; r < pixels; r += block) {
    const int64_t rows = pixels - r < block ? pixels - r : block;
    const T* from = static_cast<const T*>(source.data) + r * stride;
    int64_t c = 0;
    for (; c + kTiles * kLanes <= channels; c += kTiles * kLanes) {
      block_moments<kTiles, false>(from + c, rows, stride, 0, r == 0, shift + c, sums + c, squares + c);
    }
    for (; c + kLanes <= channels; c += kLanes) {
      block_moments<1, false>(from + c, rows, stride, 0, r == 0, shift + c, sums + c, squares + c);
    }
    if (c < channels) {
      block_moments<1, true>(from + c, rows, stride, channels - c, r == 0, shift + c, sums + c, squares + c);
    }
  }
}

template <bool kSilu, typename T>
inline void apply_rows(
    const GroupNormSource& source, T* y, T* concat, int64_t pixels, int64_t stride, const float* center,
    const float* gain, const float* offset) {
  const int64_t channels = source.channels;
  const T* x = static_cast<const T*>(source.data);
  for (int64_t r = 0; r < pixels; ++r, x += source.stride, y += stride) {
    if (concat) std::memcpy(concat + r * stride, x, channels * sizeof(T));
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      store(y + c, apply<kSilu>(load(x + c), load(center + c), load(gain + c), load(offset + c)));
    }
    if (c < channels) {
      const int64_t n = channels - c;
      store(y + c, apply<kSilu>(load(x + c, n), load(center + c), load(gain + c), load(offset + c)), n);
    }
  }
}

// The scratch's arrays are padded by the caller. A source's last register may reach past its channels: into
// the next source's, whose own numbers come afterwards, or into the padding.
template <typename T>
void group_norm_nhwc(
    const GroupNormSources& sources, T* y, T* concat, int64_t pixels, int64_t stride, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, float* scratch) {
  const int64_t padded = padded_channels(channels);
  double* sums = reinterpret_cast<double*>(scratch);
  double* squares = sums + padded;
  float* shift = scratch + 4 * padded;
  float *center = shift + padded, *gain = center + padded, *offset = gain + padded;

  int64_t at = 0;
  for (const GroupNormSource& source : sources.of) {
    channel_moments<T>(source, pixels, shift + at, sums + at, squares + at);
    at += source.channels;
  }

  for (int64_t first = 0; first < channels; first += channels_per_group) {
    Moments group;
    for (int64_t c = first; c < first + channels_per_group; ++c) {
      const double add = args.add ? args.add[c] : 0;
      group.merge(static_cast<double>(pixels), shift[c] + add, sums[c], squares[c]);
    }
    const double mean = group.mean(), rstd = reciprocal_root(group.variance() + args.eps);
    const float* add = args.add ? args.add + first : nullptr;
    fold_statistics(mean, rstd, add, channels_per_group, {center + first, gain + first, offset + first});
  }
  fold_affine(args, 0, channels, {center, gain, offset});
  at = 0;
  for (const GroupNormSource& source : sources.of) {
    T* const copy = concat ? concat + at : nullptr;
    if (args.silu) {
      apply_rows<true>(source, y + at, copy, pixels, stride, center + at, gain + at, offset + at);
    } else {
      apply_rows<false>(source, y + at, copy, pixels, stride, center + at, gain + at, offset + at);
    }
    at += source.channels;
  }
}

// ---- channels first: a group is one stretch of memory, of each source ----

template <typename T>
inline float sum_of(const T* x, int64_t n) {
  Float total[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= n; k += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) total[j] += load(x + k + j * kLanes);
  }
  for (; k + kLanes <= n; k += kLanes) total[0] += load(x + k);
  if (k < n) total[1] += load(x + k, n - k);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Adds n values, each plus `add`, to the group's moments.
template <typename T>
inline void add_moments(const T* x, int64_t n, double add, Moments& group) {
  const float mean = sum_of(x, n) / static_cast<float>(n);
  const Float center = broadcast(mean);
  Float s1[4] = {}, s2[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= n; k += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Float d = load(x + k + j * kLanes) - center;
      s1[j] += d;
      s2[j] += d * d;
    }
  }
  for (; k < n; k += kLanes) {
    const Float d = k + kLanes <= n ? load(x + k) - center : keep(load(x + k, n - k) - center, n - k);
    s1[0] += d;
    s2[0] += d * d;
  }
  group.merge(
      static_cast<double>(n), mean + add, sum((s1[0] + s1[1]) + (s1[2] + s1[3])),
      sum((s2[0] + s2[1]) + (s2[2] + s2[3])));
}

template <bool kSilu, typename T>
inline void apply_span(const T* x, T* y, int64_t n, float center, float gain, float offset) {
  const Float m = broadcast(center), g = broadcast(gain), b = broadcast(offset);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(y + k, apply<kSilu>(load(x + k), m, g, b));
  if (k < n) store(y + k, apply<kSilu>(load(x + k, n - k), m, g, b), n - k);
}

template <typename T>
void group_norm_nchw(
    const GroupNormSources& sources, T* y, T* concat, int64_t pixels, const GroupNormArgs& args) {
  Moments group;
  int64_t channel = 0;
  for (const GroupNormSource& source : sources.of) {
    const T* x = static_cast<const T*>(source.data);
    const int64_t spans =
        args.add == nullptr ? 1 : source.channels;  // one sum runs over what shares one `add`
    const int64_t length = args.add == nullptr ? pixels * source.channels : pixels;
    for (int64_t span = 0; span < spans; ++span) {
      const double add = args.add == nullptr ? 0 : args.add[channel + span];
      for (int64_t begin = 0; begin < length; begin += kBlockFloats) {
        const int64_t n = length - begin < kBlockFloats ? length - begin : kBlockFloats;
        add_moments(x + span * length + begin, n, add, group);
      }
    }
    channel += source.channels;
  }
  const double mean = group.mean(), rstd = reciprocal_root(group.variance() + args.eps);
  constexpr int64_t kChannels = 64;
  float center[kChannels], gain[kChannels], offset[kChannels];
  const Folded folded{center, gain, offset};
  channel = 0;
  for (const GroupNormSource& source : sources.of) {
    const T* x = static_cast<const T*>(source.data);
    for (int64_t from = 0; from < source.channels; from += kChannels) {
      const int64_t count = source.channels - from < kChannels ? source.channels - from : kChannels;
      fold_statistics(mean, rstd, args.add ? args.add + channel : nullptr, count, folded);
      fold_affine(args, channel, count, folded);
      for (int64_t c = 0; c < count; ++c, x += pixels, y += pixels) {
        if (args.silu) {
          apply_span<true>(x, y, pixels, center[c], gain[c], offset[c]);
        } else {
          apply_span<false>(x, y, pixels, center[c], gain[c], offset[c]);
        }
        if (concat) std::memcpy(concat + (channel + c) * pixels, x, pixels * sizeof(T));
      }
      channel += count;
    }
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
