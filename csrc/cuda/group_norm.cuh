// What the GroupNorm kernels share: how a tensor is cut into tiles, sums over a tile, and the statistics.
//
// A block has a tile: some channels x some pixels of one sample, in registers, as it was read. Every thread
// keeps to its own channels (V of them where channels are fastest in memory, else one) and walks over pixels;
// so what belongs to a channel (where it lies, its mean, its gain) is worked out once a thread, and a channel
// may come from either half of a virtual concatenation.
//
// Sums are taken by channel, about the channel's own mean, and folded into groups afterwards: a mean comes
// off before anything is squared or scaled, so that a large one cancels nowhere, and `add`, constant over a
// channel, never meets the pixels at all. Every sum has one order: the same bits in every run.
#pragma once

#include <algorithm>
#include <optional>

#include "device.cuh"
#include "kernels.h"
#include "vec.cuh"

namespace ddpm_fast::cuda {

constexpr int kWarp = 32;
constexpr int kMostSums = 2;  // that are taken at once
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- launches: from shape, dtype and alignment only ----

struct Cut {
  int width;     // channels of a block
  int tiles;     // blocks that share a sample's channels
  int lanes;     // threads side by side along the axis that is fastest in memory: a power of two
  int threads;   // of a block
  int accesses;  // of a thread, V elements each
  int64_t chunk;
  int chunks;  // blocks that share a channel's pixels, `chunk` each

  int64_t blocks(int64_t batch) const { return batch * tiles * chunks; }
};

constexpr int kMostThreads = 512;         // 128 registers a thread are left
constexpr int kSector = 32, kLine = 128;  // bytes: what memory moves at least, what a warp best asks for
// About one a multiprocessor: below it, rather narrow tiles than idle ones.
constexpr int kEnoughBlocks = 128;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t power_of_two(int64_t n) {  // the least that is not below n
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// Whether every access can be of 16 bytes: of channels where they are fastest, else of pixels.
template <typename... Pointers>
bool can_be_wide(const GroupNorm& op, Pointers... pointers) {
  const int64_t wide = 16 / element_size(op.dtype);
  const bool whole =
      op.channels_last ? op.channels % wide == 0 && op.x_channels % wide == 0 : op.pixels % wide == 0;
  return whole && (aligned(pointers) && ...);
}

// `groups` whole groups x all pixels; nothing where a thread would need more than `most` accesses.
inline std::optional<Cut> tile_of_groups(const GroupNorm& op, int64_t groups, int vector, int most) {
  const int64_t width = groups * (op.channels / op.groups);
  int64_t lanes, threads, accesses;
  if (op.channels_last) {
    if (width % vector != 0 || width > kWarp * vector) return {};
    lanes = power_of_two(width / vector);
    const bool few = op.batch * divide_up(op.groups, groups) < kEnoughBlocks;  // more threads in each, then
    threads = std::min<int64_t>(
        kMostThreads, power_of_two(divide_up(op.pixels * lanes, std::min(most, few ? 4 : 8))));
    threads = std::max({threads, power_of_two(width), int64_t{kWarp}});
    accesses = divide_up(op.pixels, threads / lanes);
  } else {
    const int64_t vectors = divide_up(op.pixels, vector);
    // A line's worth of lanes; up to a warp's, 4 accesses each (sums then need no shared memory); then more.
    lanes =
        std::min(power_of_two(vectors), std::clamp<int64_t>(power_of_two(divide_up(vectors, 4)), 8, kWarp));
    while (lanes > 1 && width * lanes > kMostThreads) lanes /= 2;
    while (divide_up(vectors, lanes) > most && 2 * width * lanes <= kMostThreads) lanes *= 2;
    threads = divide_up(width * lanes, kWarp) * kWarp;
    accesses = divide_up(vectors, lanes);
  }
  if (threads > kMostThreads || accesses > most) return {};
  return Cut{
      static_cast<int>(width),
      static_cast<int>(divide_up(op.groups, groups)),
      static_cast<int>(lanes),
      static_cast<int>(threads),
      static_cast<int>(accesses),
      op.pixels,
      1};
}

// The tile that is read once. It gains groups until its rows are whole sectors and it is worth a block; then,
// where channels are fastest, to a line's width as long as blocks are left for the whole device.
inline std::optional<Cut> resident_cut(const GroupNorm& op, int vector, int most) {
  std::optional<Cut> best;
  const int64_t size = element_size(op.dtype);
  for (int64_t groups = 1; groups <= op.groups; groups *= 2) {
    const std::optional<Cut> cut = tile_of_groups(op, groups, vector, most);
    if (!cut) continue;
    if (best) {
      const bool narrow = op.channels_last && best->width * size < kSector;
      const bool tiny = best->threads < 128 && cut->threads <= 256;
      const bool line = op.channels_last && cut->width * size <= kLine && cut->accesses <= 8 &&
                        cut->blocks(op.batch) >= kEnoughBlocks;
      if (!narrow && !tiny && !line) break;
    }
    best = cut;
  }
  return best;
}

constexpr int kSplitThreads = 256, kSplitAccesses = 8;

// Tiles for what does not fit: their channels need not be whole groups.
inline Cut split_cut(const GroupNorm& op, int vector) {
  int64_t lanes, width, chunk;
  if (op.channels_last) {
    lanes = std::min<int64_t>(power_of_two(divide_up(op.channels, vector)), vector == 1 ? kWarp : kLine / 16);
    width = std::min(op.channels, lanes * vector);
    chunk = kSplitThreads / lanes * kSplitAccesses;
  } else {
    const int64_t vectors = divide_up(op.pixels, vector);
    lanes = std::clamp<int64_t>(power_of_two(divide_up(vectors, kSplitAccesses)), 8, kSplitThreads);
    width = std::min(op.channels, kSplitThreads / lanes);
    chunk = lanes * kSplitAccesses * vector;
  }
  const int threads =
      op.channels_last ? kSplitThreads : static_cast<int>(divide_up(width * lanes, kWarp) * kWarp);
  return Cut{
      static_cast<int>(width),
      static_cast<int>(divide_up(op.channels, width)),
      static_cast<int>(lanes),
      threads,
      kSplitAccesses,
      chunk,
      static_cast<int>(divide_up(op.pixels, chunk))};
}

// Floats of scratch with slots of `sums` sums by chunk and channel, and `rows` rows by channel; 0 where one
// launch does. Alignment is not known yet: enough for either way of access. most(vector) is the launch's
// bound.
template <typename F>
int64_t split_scratch(const GroupNorm& op, int sums, int rows, const F& most) {
  int64_t chunks = 0;
  for (const int vector : {1, static_cast<int>(16 / element_size(op.dtype))}) {
    if (!resident_cut(op, vector, most(vector)))
      chunks = std::max<int64_t>(chunks, split_cut(op, vector).chunks);
  }
  return chunks == 0 ? 0 : (sums * chunks + rows) * op.batch * op.channels;
}

// ---- a tile in registers ----

__device__ inline float value(const Operand& operand, int64_t sample, int channel, float otherwise) {
  if (operand.data == nullptr) return otherwise;
  const int64_t at = sample * operand.stride + channel;
  switch (operand.dtype) {
    case Dtype::kFloat:
      return static_cast<const float*>(operand.data)[at];
    case Dtype::kDouble:
      return static_cast<float>(static_cast<const double*>(operand.data)[at]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(operand.data)[at]);
    default:
      return to_float(static_cast<const __half*>(operand.data)[at]);
  }
}

// What a row by channel, which is 16-byte aligned where there are several, holds of the thread's channels.
template <int N>
__device__ __forceinline__ void read(const float* row, float (&values)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + k);
      values[k] = four.x;
      values[k + 1] = four.y;
      values[k + 2] = four.z;
      values[k + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = row[k];
  }
}

template <typename T, int V, int K, bool kLast>
struct Tile {
  static constexpr int kChannels = kLast ? V : 1;  // of a thread
  // An access is worked through in runs, so that no more than four channels' coefficients are at hand at a
  // time.
  static constexpr int kRun = kLast && V > 4 ? 4 : V, kRunChannels = kLast ? kRun : 1;

  int64_t sample, pixels, first_pixel, pixel_step;  // pixels: of the whole image
  float count;                                      // of the tile's pixels
  int first_channel, channel;                       // of the block; the thread's first within the block
  int chunk, width, lanes, channels;
  int accesses;  // that the thread has; 0 where its channels do not exist

  __device__ Tile(const GroupNorm& op, const Cut& cut) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & (cut.lanes - 1);
    const int other = thread / cut.lanes;
    chunk = static_cast<int>(blockIdx.x % cut.chunks);
    const unsigned tile = blockIdx.x / cut.chunks;
    sample = tile / cut.tiles;
    first_channel = static_cast<int>(tile % cut.tiles) * cut.width;
    channel = kLast ? lane * V : other;
    pixels = op.pixels;
    width = cut.width;
    lanes = cut.lanes;
    channels = static_cast<int>(op.channels);

    const int64_t begin = chunk * cut.chunk, left = pixels - begin;
    const int here = static_cast<int>(left < cut.chunk ? left : cut.chunk);
    const int first = kLast ? other : lane * V;
    const int step = kLast ? static_cast<int>(blockDim.x) / lanes : lanes * V;
    count = static_cast<float>(here);
    first_pixel = begin + first;
    pixel_step = step;
    const bool exists = channel < width && first_channel + channel < channels && first < here;
    accesses = exists ? (here - first + step - 1) / step : 0;
  }

  // The offset of the thread's first access in a tensor of `of` channels, as of channel c, and from one
  // access to the next.
  __device__ int64_t start(int64_t c, int64_t of) const {
    return kLast ? (sample * pixels + first_pixel) * of + c : (sample * of + c) * pixels + first_pixel;
  }
  __device__ int64_t step(int64_t of) const { return kLast ? pixel_step * of : pixel_step; }

  // Which of two tensors the thread's channels are in, x or skip behind it; where they begin and the step
  // there.
  template <typename Pointer>
  __device__ Pointer
  choose(Pointer x, Pointer skip, int64_t x_channels, int64_t& first, int64_t& along) const {
    const int64_t c = first_channel + channel;
    const bool in_x = c < x_channels;
    const int64_t of = in_x ? x_channels : channels - x_channels;
    first = start(in_x ? c : c - x_channels, of);
    along = step(of);
    return in_x ? x : skip;
  }

  __device__ void load_all(const void* x, const void* skip, int64_t x_channels, Raw<T, V> (&raw)[K]) const {
    int64_t first, along;
    const T* from = static_cast<const T*>(choose(x, skip, x_channels, first, along)) + first;
#pragma unroll
    for (int k = 0; k < K; ++k) raw[k] = k < accesses ? load<V>(from + k * along) : Raw<T, V>{};
  }

  // Which of the thread's channels element v of an access is of.
  __device__ static constexpr int channel_of(int v) { return kLast ? v : 0; }

  // unpack for a later pass. Left to itself, the compiler would convert the tile once and spill the floats;
  // and, where a thread has eight channels, keep in registers what shared memory holds of them.
  __device__ static void unpack_anew(Raw<T, V> raw, float (&x)[V]) {
#ifdef __CUDA_ARCH__
    if constexpr (V > 1) asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
    if constexpr (kChannels > 4) asm volatile("" ::: "memory");
#endif
    unpack<T, V>(raw, x);
  }

  // Sums over the block's threads of a channel; every one of them gets the total. `slots`: see sum_slots.
  template <int M>
  __device__ void sum(float (&values)[M][kChannels], float* slots) const {
    const int from = kLast ? lanes : 1, to = kLast ? kWarp : min(lanes, kWarp);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        for (int mask = from; mask < to; mask *= 2) {
          values[m][c] += __shfl_xor_sync(kAllLanes, values[m][c], mask);
        }
      }
    }
    const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    const int parts = kLast ? warps : lanes / kWarp, part = kLast ? warp : warp % max(parts, 1);
    if (parts <= 1) return;
    const bool writes = kLast ? threadIdx.x % kWarp < lanes : threadIdx.x % kWarp == 0;
    static_assert(M <= kMostSums);
    float* totals = slots;
    slots += kMostSums * width;  // others may still read the totals of the sum before
    if (writes && channel < width) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) slots[(m * width + channel + c) * parts + part] = values[m][c];
      }
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < M * width; k += static_cast<int>(blockDim.x)) {
      float total = 0;
      for (int p = 0; p < parts; ++p) total += slots[k * parts + p];
      totals[k] = total;
    }
    __syncthreads();
    if (channel < width) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values[m][c] = totals[m * width + channel + c];
      }
    }
  }

  // The mean of each of the thread's channels over the tile, and the sums of what is left and of its squares.
  __device__ void moments(
      const Raw<T, V> (&raw)[K], float* slots, float (&mean)[1][kChannels],
      float (&sums)[2][kChannels]) const {
    for (int c = 0; c < kChannels; ++c) mean[0][c] = sums[0][c] = sums[1][c] = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float x[V];
      unpack<T, V>(raw[k], x);  // zeros where there is nothing
#pragma unroll
      for (int v = 0; v < V; ++v) mean[0][channel_of(v)] += x[v];
    }
    sum(mean, slots);
    const float inverse = 1 / count;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) mean[0][c] *= inverse;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= accesses) break;
      float x[V];
      unpack_anew(raw[k], x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int c = channel_of(v);
        const float rest = x[v] - mean[0][c];
        sums[0][c] += rest;
        sums[1][c] += rest * rest;
      }
    }
    sum(sums, slots);
  }

  // Whether this thread speaks for its channels.
  __device__ bool leads() const {
    return accesses > 0 && (kLast ? static_cast<int>(threadIdx.x) < lanes : (threadIdx.x & (lanes - 1)) == 0);
  }
};

// Sums over a warp; every lane gets them.
template <int M>
__device__ inline void warp_sum(float (&values)[M]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) values[m] += __shfl_xor_sync(kAllLanes, values[m], mask);
  }
}

constexpr int kGroupThreads = 128;  // of a block that has one group

// Sums over such a block; every thread gets them.
template <int M>
__device__ inline void block_sum(float (&values)[M]) {
  __shared__ float parts[M][kGroupThreads / kWarp];
  warp_sum(values);
  __syncthreads();  // others may still read the parts of the sum before
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) parts[m][threadIdx.x / kWarp] = values[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    values[m] = 0;
#pragma unroll
    for (int k = 0; k < kGroupThreads / kWarp; ++k) values[m] += parts[m][k];
  }
}

// Floats that Tile::sum needs.
inline int64_t sum_slots(const Cut& cut, bool channels_last) {
  const int64_t parts = channels_last ? cut.threads / kWarp : cut.lanes / kWarp;
  return parts <= 1 ? 0 : kMostSums * cut.width * (parts + 1);
}

// ---- statistics ----

struct Statistics {
  float lift;  // what x - (the channel's mean) lacks of x + add - (the group's mean)
  float rstd;
};

// From each channel's mean, sums about it and `add`. Means of a group's channels are compared with each
// other, never with zero: their differences are exact. The pointers are at the group's first channel.
__device__ inline Statistics statistics(
    const float* mean, const float* s1, const float* s2, const float* add, int c, int group, float pixels,
    float eps) {
  const float by_pixel = 1 / pixels, by_channel = 1 / static_cast<float>(group);
  float middle = 0;
  for (int j = 0; j < group; ++j) middle += mean[j];
  middle *= by_channel;
  float rest = 0;
  for (int j = 0; j < group; ++j) rest += mean[j] - middle + add[j] + s1[j] * by_pixel;
  rest *= by_channel;
  float variance = 0;
  for (int j = 0; j < group; ++j) {
    const float lift = mean[j] - middle + add[j] - rest;
    variance += s2[j] * by_pixel + lift * (2 * s1[j] * by_pixel + lift);
  }
  variance *= by_channel;
  if (variance < 0) variance = 0;  // by rounding; NaN stays
  return {mean[c] - middle + add[c] - rest, __frcp_rn(__fsqrt_rn(variance + eps))};
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;  // one instruction, within a unit; __fdividef is documented as within two
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// y / (1 + e^-y). What __expf lacks where y is large, e^-y is small beside 1 or the result beside others.
__device__ __forceinline__ float silu(float y) { return y * reciprocal(1 + __expf(-y)); }

// What a block knows of its channels, in shared memory: arrays of `width` floats, then the slots of
// Tile::sum.
struct Channels {
  float *mean, *sum1, *sum2, *add;             // by the threads that lead
  float *gain, *offset, *lift, *rstd, *slots;  // y = act((x - mean) gain + offset)

  static int64_t bytes(const Cut& cut, bool channels_last, int more_rows = 0) {
    return 4 * ((8 + more_rows) * cut.width + sum_slots(cut, channels_last));
  }

  __device__ explicit Channels(int width, int more_rows = 0) {
    float* row = dynamic_shared<float>();
    for (float** array : {&mean, &sum1, &sum2, &add, &gain, &offset, &lift, &rstd}) {
      *array = row;
      row += width;
    }
    slots = row + more_rows * width;
  }
};

// The statistics of a tile that holds whole groups: fills in `channels`, for all threads to read.
template <typename T, int V, int K, bool kLast>
__device__ inline void normalise(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const Raw<T, V> (&raw)[K],
    const Channels& channels) {
  const int c = static_cast<int>(threadIdx.x), group = static_cast<int>(op.channels / op.groups);
  const bool owns = c < tile.width && tile.first_channel + c < tile.channels;
  float weight = 1, bias = 0, film = 1, shift = 0;
  if (owns) {  // asked for early: it arrives while the pixels do
    const int at = tile.first_channel + c;
    weight = value(op.weight, 0, at, 1);
    bias = value(op.bias, 0, at, 0);
    film = 1 + value(op.scale, tile.sample, at, 0);
    shift = value(op.shift, tile.sample, at, 0);
    channels.add[c] = value(op.add, tile.sample, at, 0);
  }
  float mean[1][Tile<T, V, K, kLast>::kChannels], sums[2][Tile<T, V, K, kLast>::kChannels];
  tile.moments(raw, channels.slots, mean, sums);
  if (tile.leads()) {
#pragma unroll
    for (int j = 0; j < tile.kChannels; ++j) {
      channels.mean[tile.channel + j] = mean[0][j];
      channels.sum1[tile.channel + j] = sums[0][j];
      channels.sum2[tile.channel + j] = sums[1][j];
    }
  }
  __syncthreads();
  if (owns) {
    const int first = c / group * group;
    const Statistics found = statistics(
        channels.mean + first, channels.sum1 + first, channels.sum2 + first, channels.add + first, c - first,
        group, tile.count, op.eps);
    const float gain = weight * film * found.rstd;
    channels.gain[c] = gain;
    channels.offset[c] = bias * film + shift + found.lift * gain;
    channels.lift[c] = found.lift;
    channels.rstd[c] = found.rstd;
  }
  __syncthreads();
}

// ---- split: the statistics of what one block cannot hold ----

// Rows by (sample, channel) that `finish` leaves and the later launches read.
enum Row { kMean, kGain, kOffset, kLift, kRstd, kSum, kStatisticsRows };

// Launches `partials` and `finish`; slots: 3 sums by chunk and channel, rows: kStatisticsRows by channel.
void split_statistics(
    const GroupNorm&, const Cut&, bool wide, float* slots, float* rows, cudaStream_t stream);

}  // namespace ddpm_fast::cuda
