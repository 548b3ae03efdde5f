// y = silu((1 + scale) (weight norm(x + add) + bias) + shift), statistics over a group's channels and pixels.
//
// Fused: the time embedding before, affine, FiLM and SiLU after. One read for the statistics, one read and
// one write to apply. float32 arithmetic; the sums run about a pilot, the mean of the group's first eighth,
// and are merged in float64. A large mean cancels nowhere: where the pilot is off the mean by d, the variance
// is at least d^2 / 8, for an eighth of the elements are off by as much.
//
// x may be two tensors, its first channels in one and the rest in the other: [x, skip] without building it.
// A group's statistics merge from wherever its channels lie. Built it is where asked for, from what was read.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "silu.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int64_t kBlockFloats = 4096;  // 16 KB: stays in L1; so many values are summed in float32
constexpr int64_t kPilot = 8;           // the pilot is the mean of one in so many

// Of each group, from its sums of differences from the pilot and of their squares: the mean, in place of the
// sum, and the reciprocal of the standard deviation, in place of the squares.
inline void statistics(
    int64_t groups, int64_t elements, double eps, const float* pilots, double* sums, double* squares) {
  const double n = static_cast<double>(elements);
  for (int64_t g = 0; g < groups; ++g) {
    double variance = (squares[g] - sums[g] * sums[g] / n) / n;
    variance = variance < 0 ? 0 : variance;  // NaN stays
    squares[g] = 1 / __builtin_sqrt(variance + eps);
    sums[g] = pilots[g] + sums[g] / n;
  }
}

// y = silu((x - center) gain + offset), by channel: the mean comes off first, as a float, and what that float
// lacks of it is in the offset.
struct Folded {
  float *center, *gain, *offset;
};

// n elements and up to a register more.
inline void fill(float* to, int64_t n, float value) {
  for (int64_t k = 0; k < n; k += kLanes) store(to + k, broadcast(value));
}

// x + rest less add, as a float and what that float lacks (Knuth 1969, section 4.2.2, theorem B).
inline void subtract(float* x, float* rest, const float* add, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float difference = x[k] - add[k], back = difference - x[k];
    rest[k] += (x[k] - (difference - back)) - (add[k] + back);
    x[k] = difference;
  }
}

// The mean, what its float lacks, and the reciprocal deviation of each channel become its three numbers.
inline void fold(const GroupNormArgs& args, int64_t from, int64_t channels, const Folded& to) {
  if (args.add) subtract(to.center, to.offset, args.add + from, channels);
  if (args.weight) {
    for (int64_t c = 0; c < channels; ++c) to.gain[c] *= args.weight[from + c];
  }
  for (int64_t c = 0; c < channels; ++c) to.offset[c] *= -to.gain[c];
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
  for (float* values : {to.center, to.gain, to.offset}) {  // one NaN, which store_pair keeps
    for (int64_t c = 0; c < channels; ++c) {
      if (values[c] != values[c]) values[c] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// How a result comes of a channel's three numbers. kSiluNear: of u = x gain + offset, within kSiluBound.
enum class Act { kNone, kSilu, kSiluNear };

// Makes the numbers those of kSiluNear, if it will do. `reach` bounds |x - center|; the mean, which goes into
// `offset`, must not be so many deviations that the sum would lose digits.
inline Act choose_act(bool silu, int64_t channels, const float* reach, const Folded& by) {
  if (!silu) return Act::kNone;
  constexpr float kManyDeviations = 4, kLimit = 0.99f * kSiluBound;
  int32_t far = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const float gain = __builtin_fabsf(by.gain[c] * kToLog2),
                offset = __builtin_fabsf(by.offset[c] * kToLog2);
    far |= !(gain * reach[c] + offset < kLimit);
    far |= !(gain * __builtin_fabsf(by.center[c]) <= kManyDeviations);
  }
  if (far) return Act::kSilu;
  for (int64_t c = 0; c < channels; ++c) {
    by.offset[c] = (by.offset[c] - by.center[c] * by.gain[c]) * kToLog2;
    by.gain[c] *= kToLog2;
  }
  return Act::kSiluNear;
}

// N registers in place; center(k), gain(k) and offset(k) are the k-th's.
template <Act kAct, typename T, int N, typename Center, typename Gain, typename Offset>
[[gnu::always_inline]] inline void apply(
    Float (&x)[N], const Center& center, const Gain& gain, const Offset& offset) {
  if constexpr (kAct != Act::kSiluNear) {
    for (int k = 0; k < N; ++k) x[k] -= center(k);
  }
  for (int k = 0; k < N; ++k) x[k] = x[k] * gain(k) + offset(k);
  if constexpr (kAct != Act::kNone) silu<T, kAct == Act::kSiluNear>(x);
}

template <Act kAct, typename T>
inline void store_result(T* to, Pair from) {
  if constexpr (kAct == Act::kNone) {
    store_pair(to, from);
  } else {
    store_pair_near(to, from);
  }
}

// run(act), the act a constant by its type.
template <typename F>
inline void for_act(Act act, const F& run) {
  using std::integral_constant;
  if (act == Act::kNone) run(integral_constant<Act, Act::kNone>());
  if (act == Act::kSilu) run(integral_constant<Act, Act::kSilu>());
  if (act == Act::kSiluNear) run(integral_constant<Act, Act::kSiluNear>());
}

constexpr int64_t kPairLanes = 2 * kLanes;

// Asks for what lies `ahead` elements after kPairs pairs at x, perhaps past the end of a tensor.
template <int kPairs, int kCache, typename T>
inline void prefetch(const T* x, int64_t ahead) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(x) + ahead * sizeof(T);
  for (size_t line = 0; line < kPairs * kPairLanes * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + line), /*write=*/0, /*locality=*/4 - kCache);
  }
}

// ---- channels last: rows of channels ----

template <typename T>
inline Pair load_pair(const T* from, int64_t n) {
  T buffer[kPairLanes] = {};
  std::memcpy(buffer, from, n * sizeof(T));
  return load_pair(buffer);
}

template <typename T>
inline void store_pair(T* to, Pair from, int64_t n) {
  T buffer[kPairLanes];
  store_pair(buffer, from);
  std::memcpy(to, buffer, n * sizeof(T));
}

// run(channel, pairs, partial) over tiles of channels: four pairs where there are 32 registers, two, one, and
// what is left, a partial one. The latter two arguments are constants, by their types.
template <typename F>
inline void for_tiles(int64_t channels, const F& run) {
  using std::integral_constant;
  int64_t c = 0;
  if constexpr (kLanes == 16) {
    for (; c + 4 * kPairLanes <= channels; c += 4 * kPairLanes) {
      run(c, integral_constant<int, 4>(), integral_constant<bool, false>());
    }
  }
  for (; c + 2 * kPairLanes <= channels; c += 2 * kPairLanes) {
    run(c, integral_constant<int, 2>(), integral_constant<bool, false>());
  }
  for (; c + kPairLanes <= channels; c += kPairLanes) {
    run(c, integral_constant<int, 1>(), integral_constant<bool, false>());
  }
  if (c < channels) run(c, integral_constant<int, 1>(), integral_constant<bool, true>());
}

// Sums of some rows by channel, each where a pair holds it: its slot. The tile is kPairs pairs wide, a
// partial one `lanes` channels.
template <int kPairs, bool kPartial, typename T>
inline void column_sums(const T* x, int64_t rows, int64_t stride, int64_t lanes, float* sums) {
  Float total[2 * kPairs] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kPairs; ++k) {
      const T* at = x + r * stride + k * kPairLanes;
      const Pair v = kPartial ? load_pair(at, lanes) : load_pair(at);
      total[2 * k] += v.a, total[2 * k + 1] += v.b;
    }
  }
  for (int k = 0; k < 2 * kPairs; ++k) store(sums + k * kLanes, total[k]);
}

constexpr int64_t kBlockRows = 64;  // so many values are summed in float32

// Adds some rows' sums of differences from `center`, and of their squares; `peaks` keeps the largest of
// those.
template <int kPairs, bool kPartial, typename T>
inline void column_deviations(
    const T* x, int64_t rows, int64_t stride, int64_t lanes, const float* center, bool first, double* sums,
    double* squares, float* peaks) {
  constexpr int kRegisters = 2 * kPairs;
  Float c[kRegisters], s1[kRegisters] = {}, s2[kRegisters] = {};
  for (int k = 0; k < kRegisters; ++k) c[k] = load(center + k * kLanes);
  constexpr int64_t kRowsAhead = 8;  // rows are too far apart for the processor to guess them
  for (int64_t r = 0; r < rows; ++r) {
    prefetch<kPairs, /*kCache=*/1>(x + r * stride, kRowsAhead * stride);
    for (int k = 0; k < kPairs; ++k) {
      const T* at = x + r * stride + k * kPairLanes;
      const Pair v = kPartial ? load_pair(at, lanes) : load_pair(at);
      const Float a = v.a - c[2 * k], b = v.b - c[2 * k + 1];
      s1[2 * k] += a, s1[2 * k + 1] += b;
      s2[2 * k] += a * a, s2[2 * k + 1] += b * b;
    }
  }
  float s1s[kRegisters * kLanes], s2s[kRegisters * kLanes];
  for (int k = 0; k < kRegisters; ++k) store(s1s + k * kLanes, s1[k]), store(s2s + k * kLanes, s2[k]);
  if (first) {
    for (int k = 0; k < kRegisters * kLanes; ++k) sums[k] = s1s[k], squares[k] = peaks[k] = s2s[k];
  } else {
    for (int k = 0; k < kRegisters * kLanes; ++k) {
      sums[k] += s1s[k], squares[k] += s2s[k];
      peaks[k] = peaks[k] < s2s[k] ? s2s[k] : peaks[k];
    }
  }
}

template <Act kAct, typename T>
inline void apply_rows(
    const GroupNormSource& source, T* y, T* concat, int64_t pixels, int64_t stride, const Folded& by) {
  const int64_t channels = source.channels;
  for (int64_t r = 0; r < pixels; ++r) {
    const T* x = static_cast<const T*>(source.data) + r * source.stride;
    T* to = y + r * stride;
    if (concat) std::memcpy(concat + r * stride, x, channels * sizeof(T));
    for_tiles(channels, [&](int64_t c, auto pairs, auto partial) {
      constexpr int kAtOnce = pairs < 2 ? 1 : 2;
      for (int64_t at = c; at < c + pairs * kPairLanes; at += kAtOnce * kPairLanes) {
        Float v[2 * kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) {
          const T* from = x + at + k * kPairLanes;
          const Pair pair = partial ? load_pair(from, channels - at) : load_pair(from);
          v[2 * k] = pair.a, v[2 * k + 1] = pair.b;
        }
        const auto number = [at](const float* values) {
          return [values, at](int k) { return load(values + at + k * kLanes); };
        };
        apply<kAct, T>(v, number(by.center), number(by.gain), number(by.offset));
        for (int k = 0; k < kAtOnce; ++k) {
          const Pair pair = {v[2 * k], v[2 * k + 1]};
          if (partial) {
            store_pair(to + at, pair, channels - at);
          } else {
            store_result<kAct>(to + at + k * kPairLanes, pair);
          }
        }
      }
    });
  }
}

// Numbers by channel to numbers by slot, and back.
template <typename T>
inline void to_slots(const float* from, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; c += kPairLanes) {
    float pair[kPairLanes];
    std::memcpy(pair, from + c, sizeof(pair));
    for (int k = 0; k < kPairLanes; ++k) to[c + k] = pair[element_at<T>(k)];
  }
}

template <typename T, typename Number>
inline void from_slots(const Number* from, int64_t channels, Number* to) {
  for (int64_t c = 0; c < channels; c += kPairLanes) {
    Number pair[kPairLanes];
    std::memcpy(pair, from + c, sizeof(pair));
    for (int k = 0; k < kPairLanes; ++k) to[c + k] = pair[slot_of<T>(k)];
  }
}

template <typename Number>
inline double sum_of_group(const Number* values, int64_t n) {
  double total[4] = {};
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    for (int j = 0; j < 4; ++j) total[j] += values[k + j];
  }
  for (; k < n; ++k) total[0] += values[k];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// The channels of two sources by slot. Each source's slots fill whole pairs; where they are the channels in
// order, numbers by channel and by slot share their memory.
template <typename T>
struct Slots {
  int64_t split, channels;

  static int64_t whole(int64_t count) { return (count + kPairLanes - 1) / kPairLanes * kPairLanes; }
  int64_t base(int source) const { return source == 0 ? 0 : whole(split); }
  int64_t end() const { return base(1) + whole(channels - split); }
  bool in_order() const { return !std::is_same_v<T, BFloat16> && (split == channels || split == base(1)); }

  void place(const float* from, float* to) const {
    if (in_order()) return;
    to_slots<T>(from, split, to);
    to_slots<T>(from + split, channels - split, to + base(1));
  }
  template <typename Number>
  void take(const Number* from, Number* to) const {
    if (in_order()) return;
    from_slots<T>(from, split, to);
    from_slots<T>(from + base(1), channels - split, to + split);
  }
};

// group_norm_scratch, cut into rows of numbers by channel (or group), and by slot.
struct Rows {
  double *sums, *squares;
  float *pilots, *peaks;
  Folded folded, slots;

  Rows(float* scratch, int64_t padded, bool in_order)
      : sums(reinterpret_cast<double*>(scratch)),
        squares(sums + padded),
        pilots(scratch + 4 * padded),
        peaks(scratch + 11 * padded) {
    folded = {pilots + padded, pilots + 2 * padded, pilots + 3 * padded};
    slots = in_order ? folded : Folded{pilots + 4 * padded, pilots + 5 * padded, pilots + 6 * padded};
  }
};

// Each channel's mean, what its float lacks and the reciprocal deviation, as `fold` takes them; by group they
// stay in `sums` and `squares`. `peaks` becomes a bound of each channel's distance from the mean.
template <typename T>
void statistics_nhwc(
    const GroupNormSources& sources, int64_t pixels, int64_t channels_per_group, const GroupNormArgs& args,
    const Slots<T>& by_slot, const Rows& rows) {
  const int64_t channels = by_slot.channels, groups = channels / channels_per_group;
  double *const sums = rows.sums, *const squares = rows.squares;
  float *const pilots = rows.pilots, *const peaks = rows.peaks;
  const Folded &folded = rows.folded, &slots = rows.slots;
  const int64_t pilot_rows = (pixels + kPilot - 1) / kPilot;
  for (int s = 0; s < 2; ++s) {
    const GroupNormSource& source = sources.of[s];
    for_tiles(source.channels, [&](int64_t c, auto pairs, auto partial) {
      column_sums<pairs, partial>(
          static_cast<const T*>(source.data) + c, pilot_rows, source.stride, source.channels - c,
          slots.gain + by_slot.base(s) + c);
    });
  }
  by_slot.take(slots.gain, folded.gain);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * channels_per_group;
    double mean = sum_of_group(folded.gain + first, channels_per_group) / static_cast<double>(pilot_rows);
    if (args.add) mean += sum_of_group(args.add + first, channels_per_group);
    pilots[g] = static_cast<float>(mean / static_cast<double>(channels_per_group));
    fill(folded.center + first, channels_per_group, pilots[g]);
  }
  if (args.add) {
    fill(folded.offset, channels, 0);
    subtract(folded.center, folded.offset, args.add, channels);
    by_slot.place(folded.offset, slots.offset);
  }
  by_slot.place(folded.center, slots.center);

  for (int64_t row = 0; row < pixels; row += kBlockRows) {
    for (int s = 0; s < 2; ++s) {
      const GroupNormSource& source = sources.of[s];
      const T* from = static_cast<const T*>(source.data) + row * source.stride;
      for_tiles(source.channels, [&](int64_t c, auto pairs, auto partial) {
        const int64_t k = by_slot.base(s) + c;
        column_deviations<pairs, partial>(
            from + c, std::min(pixels - row, kBlockRows), source.stride, source.channels - c,
            slots.center + k, row == 0, sums + k, squares + k, peaks + k);
      });
    }
  }
  if (args.add) {  // what a center lacks of its pilot
    const double n = static_cast<double>(pixels);
    for (int64_t k = 0; k < by_slot.end(); ++k) {
      const double rest = slots.offset[k];
      squares[k] -= rest * (2 * sums[k] - n * rest);
      sums[k] -= n * rest;
    }
  }
  by_slot.take(sums, sums), by_slot.take(squares, squares), by_slot.take(peaks, peaks);
  for (int64_t g = 0; g < groups; ++g) {
    sums[g] = sum_of_group(sums + g * channels_per_group, channels_per_group);
    squares[g] = sum_of_group(squares + g * channels_per_group, channels_per_group);
  }
  statistics(groups, pixels * channels_per_group, args.eps, pilots, sums, squares);
  for (int64_t g = 0; g < groups; ++g) {  // before `fill` writes past a group
    const float* const first = peaks + g * channels_per_group;
    const float peak = *std::max_element(first, first + channels_per_group);
    pilots[g] = __builtin_sqrtf(peak) + __builtin_fabsf(static_cast<float>(sums[g]) - pilots[g]);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * channels_per_group;
    const float center = static_cast<float>(sums[g]);
    fill(peaks + first, channels_per_group, pilots[g]);
    fill(folded.center + first, channels_per_group, center);
    fill(folded.offset + first, channels_per_group, static_cast<float>(sums[g] - center));
    fill(folded.gain + first, channels_per_group, static_cast<float>(squares[g]));
  }
}

template <typename T>
void group_norm_nhwc(
    const GroupNormSources& sources, T* y, T* concat, int64_t pixels, int64_t stride, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, float* scratch) {
  const int64_t split = sources.of[0].channels;
  const Slots<T> by_slot = {split, channels};
  const Rows rows(scratch, padded_channels(channels), by_slot.in_order());
  const Folded &folded = rows.folded, &slots = rows.slots;
  statistics_nhwc(sources, pixels, channels_per_group, args, by_slot, rows);
  fold(args, 0, channels, folded);
  const Act act = choose_act(args.silu, channels, rows.peaks, folded);
  by_slot.place(folded.center, slots.center), by_slot.place(folded.gain, slots.gain),
      by_slot.place(folded.offset, slots.offset);
  for (int s = 0; s < 2; ++s) {
    const GroupNormSource& source = sources.of[s];
    if (source.channels == 0) continue;
    const Folded by = {
        slots.center + by_slot.base(s), slots.gain + by_slot.base(s), slots.offset + by_slot.base(s)};
    const int64_t c = s == 0 ? 0 : split;
    T* const copy = concat ? concat + c : nullptr;
    for_act(act, [&](auto act) { apply_rows<act>(source, y + c, copy, pixels, stride, by); });
  }
}

template <typename T>
void group_norm_fold(
    const GroupNormSources& sources, float* to, int64_t step, int64_t pixels, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, float* scratch) {
  const Slots<T> by_slot = {sources.of[0].channels, channels};
  const Rows rows(scratch, padded_channels(channels), by_slot.in_order());
  statistics_nhwc(sources, pixels, channels_per_group, args, by_slot, rows);
  fold(args, 0, channels, rows.folded);
  for (const float* from : {rows.folded.center, rows.folded.gain, rows.folded.offset, rows.peaks}) {
    std::memcpy(to, from, channels * sizeof(float));
    to += step;
  }
}

// ---- channels first: a group is one stretch of memory, of each source ----

template <typename T>
inline float sum_of(const T* x, int64_t n) {
  Float total[4] = {};
  int64_t k = 0;
  for (; k + 2 * kPairLanes <= n; k += 2 * kPairLanes) {
    const Pair first = load_pair(x + k), second = load_pair(x + k + kPairLanes);
    total[0] += first.a, total[1] += first.b;
    total[2] += second.a, total[3] += second.b;
  }
  for (; k + kLanes <= n; k += kLanes) total[0] += load(x + k);
  if (k < n) total[1] += load(x + k, n - k);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Sums of differences from a pilot, and of their squares.
struct Deviations {
  Float sums = {}, squares = {};

  void take(Float d) {
    sums += d;
    squares += d * d;
  }
};

// Takes n values. Their pilot is center + rest; one float may not hold it.
template <bool kRest, typename T>
inline void take_span(const T* x, int64_t n, float center, float rest, Deviations& group) {
  const Float c = broadcast(center), e = broadcast(rest);
  const auto deviation = [&](Float v) {
    if constexpr (kRest) return (v - c) - e;
    return v - c;
  };
  int64_t k = 0;
  if (n >= 2 * kPairLanes) {
    Deviations lanes[4];
    for (; k + 2 * kPairLanes <= n; k += 2 * kPairLanes) {
      const Pair first = load_pair(x + k), second = load_pair(x + k + kPairLanes);
      lanes[0].take(deviation(first.a)), lanes[1].take(deviation(first.b));
      lanes[2].take(deviation(second.a)), lanes[3].take(deviation(second.b));
    }
    group.sums += (lanes[0].sums + lanes[1].sums) + (lanes[2].sums + lanes[3].sums);
    group.squares += (lanes[0].squares + lanes[1].squares) + (lanes[2].squares + lanes[3].squares);
  }
  for (; k + kLanes <= n; k += kLanes) group.take(deviation(load(x + k)));
  if (k < n) group.take(keep(deviation(load(x + k, n - k)), n - k));
}

// Meanwhile what lies `ahead` elements further, the next groups, is fetched into the second cache.
template <Act kAct, typename T>
inline void apply_span(const T* x, T* y, int64_t n, float center, float gain, float offset, int64_t ahead) {
  const auto all = [](float value) { return [v = broadcast(value)](int) { return v; }; };
  const auto m = all(center), g = all(gain), b = all(offset);
  int64_t k = 0;
  for (; k + 2 * kPairLanes <= n; k += 2 * kPairLanes) {
    prefetch<2, /*kCache=*/2>(x + k, ahead);
    const Pair first = load_pair(x + k), second = load_pair(x + k + kPairLanes);
    Float v[4] = {first.a, first.b, second.a, second.b};
    apply<kAct, T>(v, m, g, b);
    store_result<kAct>(y + k, {v[0], v[1]}), store_result<kAct>(y + k + kPairLanes, {v[2], v[3]});
  }
  for (; k < n; k += kLanes) {
    const bool whole = k + kLanes <= n;
    Float v[1] = {whole ? load(x + k) : load(x + k, n - k)};
    apply<kAct, T>(v, m, g, b);
    if (whole) {
      store(y + k, v[0]);
    } else {
      store(y + k, v[0], n - k);
    }
  }
}

// Channels of up to two sources, one after another.
template <typename T>
struct Channels {
  const T *first, *second;
  int64_t split, pixels;

  const T* operator[](int64_t c) const {
    return c < split ? first + c * pixels : second + (c - split) * pixels;
  }
};

// A channel's number where a pair holds it: of a pair's one channel, or of its two, each of kLanes pixels.
template <typename T, bool kTwo>
inline Pair spread(const float* of) {
  if constexpr (!kTwo) return {broadcast(of[0]), broadcast(of[0])};
  const Float first = broadcast(of[0]), second = broadcast(of[1]);
  if constexpr (!std::is_same_v<T, BFloat16>) return {first, second};
  const Float halves = blend_halves(first, second);
  return {halves, halves};
}

// Channels [from, to), by numbers that start at `from`'s. Of channels of a register or two (4 x 4 pixels),
// two pairs are worked on together.
template <Act kAct, typename T>
inline void apply_channels(
    const Channels<T>& x, T* y, int64_t from, int64_t to, const Folded& by, int64_t ahead) {
  const int64_t first = from;
  const auto together = [&](auto two) {
    constexpr int64_t kAPair = two ? 2 : 1, kAtOnce = 2 * kAPair;
    const int64_t end = from < x.split ? std::min(to, x.split) : to;
    for (; from + kAtOnce <= end; from += kAtOnce) {
      Float v[4], center[4], gain[4], offset[4];
      for (int k = 0; k < 4; k += 2) {
        const auto number = [&](const float* values, Float* into) {
          const Pair pair = spread<T, two>(values + from - first + k / 2 * kAPair);
          into[k] = pair.a, into[k + 1] = pair.b;
        };
        number(by.center, center), number(by.gain, gain), number(by.offset, offset);
        const Pair pair = load_pair(x[from] + k * kLanes);
        v[k] = pair.a, v[k + 1] = pair.b;
      }
      apply<kAct, T>(
          v, [&](int k) { return center[k]; }, [&](int k) { return gain[k]; },
          [&](int k) { return offset[k]; });
      for (int k = 0; k < 4; k += 2) store_result<kAct>(y + from * x.pixels + k * kLanes, {v[k], v[k + 1]});
    }
  };
  while (from < to) {
    if (x.pixels == kLanes) together(std::true_type());
    if (x.pixels == kPairLanes) together(std::false_type());
    if (from == to) return;
    const int64_t c = from - first;
    apply_span<kAct>(x[from], y + from * x.pixels, x.pixels, by.center[c], by.gain[c], by.offset[c], ahead);
    ++from;
  }
}

// f(data, elements, add) over the stretches of channels [from, to) that lie together and share one `add`.
template <typename T, typename F>
inline void for_stretches(const Channels<T>& x, const float* add, int64_t from, int64_t to, const F& f) {
  while (from < to) {
    const int64_t end = add ? from + 1 : (from < x.split ? std::min(to, x.split) : to);
    f(x[from], (end - from) * x.pixels, add ? static_cast<double>(add[from]) : 0.0);
    from = end;
  }
}

template <typename T>
inline float pilot_of(const Channels<T>& x, const float* add, int64_t from, int64_t to) {
  const int64_t wanted = ((to - from) * x.pixels + kPilot - 1) / kPilot;
  double total = 0;
  int64_t seen = 0;
  for_stretches(x, add, from, to, [&](const T* data, int64_t length, double plus) {
    const int64_t some = std::min(length, wanted - seen);
    if (some <= 0) return;
    total += sum_of(data, some) + static_cast<double>(some) * plus;
    seen += some;
  });
  return static_cast<float>(total / static_cast<double>(seen));
}

template <typename T>
inline void deviations_of(
    const Channels<T>& x, const float* add, int64_t from, int64_t to, float pilot, double& sums,
    double& squares, float& peak) {
  sums = squares = 0;
  Deviations block;
  Float most = {};
  int64_t room = kBlockFloats;
  const auto flush = [&] {
    sums += sum(block.sums);
    squares += sum(block.squares);
    most = block.squares > most ? block.squares : most;
    block = {}, room = kBlockFloats;
  };
  for_stretches(x, add, from, to, [&](const T* data, int64_t length, double plus) {
    const double exact = pilot - plus;
    const float center = static_cast<float>(exact), rest = static_cast<float>(exact - center);
    while (length > 0) {
      if (room == 0) flush();
      const int64_t some = std::min(length, room);
      if (add) {
        take_span<true>(data, some, center, rest, block);
      } else {
        take_span<false>(data, some, center, 0, block);
      }
      data += some, length -= some, room -= some;
    }
  });
  flush();
  peak = largest(most);
}

constexpr int64_t kGroups = 16;  // the most that are worked on at a time

// The mean and the reciprocal of the standard deviation of each of `count` groups, the first at channel
// `begin`, and a bound of its values' distance from the mean. Loops of independent groups: what one waits
// for, another computes.
template <typename T>
inline void statistics_nchw(
    const Channels<T>& x, const float* add, int64_t begin, int64_t count, int64_t channels_per_group,
    double eps, double* means, double* rstds, float* reach) {
  float pilots[kGroups];
  for (int64_t g = 0; g < count; ++g) {
    const int64_t from = begin + g * channels_per_group;
    pilots[g] = pilot_of(x, add, from, from + channels_per_group);
  }
  for (int64_t g = 0; g < count; ++g) {
    const int64_t from = begin + g * channels_per_group;
    deviations_of(x, add, from, from + channels_per_group, pilots[g], means[g], rstds[g], reach[g]);
  }
  statistics(count, channels_per_group * x.pixels, eps, pilots, means, rstds);
  for (int64_t g = 0; g < count; ++g) {
    reach[g] = __builtin_sqrtf(reach[g]) + static_cast<float>(__builtin_fabs(means[g] - pilots[g]));
  }
}

// So many groups at a time that they are still in L1 when they are applied.
template <typename T>
void group_norm_nchw(
    const GroupNormSources& sources, T* y, T* concat, int64_t pixels, int64_t channels_per_group,
    int64_t groups, const GroupNormArgs& args) {
  const Channels<T> x = {
      static_cast<const T*>(sources.of[0].data), static_cast<const T*>(sources.of[1].data),
      sources.of[0].channels, pixels};
  constexpr int64_t kChannels = 64;
  const int64_t at_once = std::clamp<int64_t>(kBlockFloats / (channels_per_group * pixels), 1, kGroups);
  for (int64_t first = 0; first < groups; first += at_once) {
    const int64_t count = std::min(at_once, groups - first);
    const int64_t begin = first * channels_per_group, end = begin + count * channels_per_group;
    double means[kGroups], rstds[kGroups];
    float reach[kGroups];
    statistics_nchw(x, args.add, begin, count, channels_per_group, args.eps, means, rstds, reach);
    for (int64_t from = begin; from < end; from += kChannels) {
      const int64_t to = std::min(from + kChannels, end);
      constexpr int64_t kRoom = kChannels + kLanes;
      float center[kRoom], gain[kRoom], offset[kRoom], distance[kRoom];
      for (int64_t c = from; c < to;) {
        const int64_t g = (c - begin) / channels_per_group;
        const int64_t next = std::min(to, begin + (g + 1) * channels_per_group), k = c - from;
        const float mean = static_cast<float>(means[g]);
        fill(center + k, next - c, mean);
        fill(offset + k, next - c, static_cast<float>(means[g] - mean));
        fill(gain + k, next - c, static_cast<float>(rstds[g]));
        fill(distance + k, next - c, reach[g]);
        c = next;
      }
      const Folded by = {center, gain, offset};
      fold(args, from, to - from, by);
      const Act act = choose_act(args.silu, to - from, distance, by);
      for_act(act, [&](auto act) { apply_channels<act>(x, y, from, to, by, (end - begin) * pixels); });
      for (int64_t c = from; concat && c < to; ++c) {
        std::memcpy(concat + c * pixels, x[c], pixels * sizeof(T));
      }
    }
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
