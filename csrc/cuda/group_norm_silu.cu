// y = silu((1 + scale) (weight norm(x + add) + bias) + shift), statistics over a group's channels and pixels.
//
// x, y: (B, C, P), float32, bfloat16 or float16, C or P fastest; x may be a virtual concatenation of two;
// weight, bias: (C,); add, scale, shift: (B, C). Fused: the time embedding before, affine, FiLM and SiLU
// after, and if asked for the copy of the concatenation. float32 arithmetic, one rounding.
//
// resident    a tile of whole groups x all pixels stays in registers: one launch, one read and one write (4
//             bytes an element in bfloat16).
// split       larger: `partials` leaves three sums by channel and chunk of pixels, each in a slot of its own,
//             `finish` merges them (Chan et al. 1983) into rows by channel, `apply` applies those. Two reads
//             and one write; no atomics, so the same bits in every run.
#include "group_norm.cuh"

namespace ddpm_fast::cuda {
namespace {

constexpr int kMostAccesses = 16;  // 64 registers of pixels

template <typename T, int V, int K, bool kLast>
__device__ inline void apply(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const Raw<T, V> (&raw)[K], const float* mean,
    const float* gain, const float* offset, T* y, T* concat) {
  const int64_t start = tile.start(tile.first_channel + tile.channel, tile.channels);
  const int64_t step = tile.step(tile.channels);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= tile.accesses) break;
    float x[V], m[tile.kRunChannels], a[tile.kRunChannels], b[tile.kRunChannels];
    tile.unpack_anew(raw[k], x);
#pragma unroll
    for (int first = 0; first < V; first += tile.kRun) {
      const int channel = tile.channel_of(first);
      read(mean + channel, m);
      read(gain + channel, a);
      read(offset + channel, b);
#pragma unroll
      for (int v = 0; v < tile.kRun; ++v) {
        float& element = x[first + v];
        const int c = tile.channel_of(v);
        element = (element - m[c]) * a[c] + b[c];
        if (op.silu) element = silu(element);
      }
    }
    const int64_t at = start + k * step;
    store<V>(y + at, pack<T, V>(x));
    if (concat != nullptr) store<V>(concat + at, raw[k]);
  }
}

// ---- one launch ----

template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kMostThreads, 1)
    resident_kernel(const GroupNorm op, const Cut cut, T* y, T* concat) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  const Channels channels(cut.width);
  Raw<T, V> raw[K];
  tile.load_all(op.x, op.skip, op.x_channels, raw);
  normalise(op, tile, raw, channels);
  if (tile.accesses == 0) return;
  apply(
      op, tile, raw, channels.mean + tile.channel, channels.gain + tile.channel,
      channels.offset + tile.channel, y, concat);
}

// ---- split ----

// slots (3, B, chunks, C): a chunk's mean by channel, and the sums of the rest and of its squares.
template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 1)
    partials_kernel(const GroupNorm op, const Cut cut, float* slots) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  Raw<T, V> raw[K];
  tile.load_all(op.x, op.skip, op.x_channels, raw);
  float mean[1][Here::kChannels], sums[2][Here::kChannels];
  tile.moments(raw, dynamic_shared<float>(), mean, sums);
  if (!tile.leads()) return;
  const int64_t step = op.batch * cut.chunks * op.channels;
  float* slot =
      slots + (tile.sample * cut.chunks + tile.chunk) * op.channels + tile.first_channel + tile.channel;
#pragma unroll
  for (int c = 0; c < Here::kChannels; ++c) {
    slot[c] = mean[0][c];
    slot[c + step] = sums[0][c];
    slot[c + 2 * step] = sums[1][c];
  }
}

// rows (kStatisticsRows, B, C) from the slots. A block has one group, a warp a channel at a time; rows hold
// what it knows of its channels meanwhile, however many those are.
__global__ void __launch_bounds__(kGroupThreads)
    finish_kernel(const GroupNorm op, const Cut cut, const float* slots, float* rows) {
  const int group = static_cast<int>(op.channels / op.groups);
  const int64_t sample = blockIdx.x / op.groups, first = blockIdx.x % op.groups * group;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = op.batch * cut.chunks * op.channels, row_step = op.batch * op.channels;
  float* row = rows + sample * op.channels + first;
  float *mean = row + kMean * row_step, *sum1 = row + kSum * row_step;
  float *sum2 = row + kRstd * row_step, *lifts = row + kLift * row_step;
  const float pixels = static_cast<float>(op.pixels);

  for (int c = warp; c < group; c += kGroupThreads / kWarp) {
    const float* slot = slots + sample * cut.chunks * op.channels + first + c;
    const auto count = [&](int k) {
      const int64_t left = op.pixels - k * cut.chunk;
      return static_cast<float>(left < cut.chunk ? left : cut.chunk);
    };
    // Near enough to the channel's mean to take all sums about it; by pixels, since the last chunk has few.
    float middle[1] = {0}, sums[2] = {0, 0};
    for (int k = lane; k < cut.chunks; k += kWarp) middle[0] += slot[k * op.channels] * (count(k) / pixels);
    warp_sum(middle);
    for (int k = lane; k < cut.chunks; k += kWarp) {
      const float* here = slot + k * op.channels;
      const float far = here[0] - middle[0], s1 = here[step];
      sums[0] += s1 + count(k) * far;
      sums[1] += here[2 * step] + far * (2 * s1 + count(k) * far);
    }
    warp_sum(sums);
    if (lane == 0) {
      mean[c] = middle[0];
      sum1[c] = sums[0];
      sum2[c] = sums[1];
      lifts[c] = value(op.add, sample, static_cast<int>(first) + c, 0);
    }
  }
  __syncthreads();
  // As `statistics`, by all the threads.
  const int thread = static_cast<int>(threadIdx.x);
  const float by_pixel = 1 / pixels, by_channel = 1 / static_cast<float>(group);
  float middle[1] = {0}, rest[1] = {0}, variance[1] = {0};
  for (int c = thread; c < group; c += kGroupThreads) middle[0] += mean[c] * by_channel;
  block_sum(middle);
  for (int c = thread; c < group; c += kGroupThreads) {
    lifts[c] += mean[c] - middle[0];
    rest[0] += (lifts[c] + sum1[c] * by_pixel) * by_channel;
  }
  block_sum(rest);
  for (int c = thread; c < group; c += kGroupThreads) {
    const float lift = lifts[c] -= rest[0];
    variance[0] += (sum2[c] * by_pixel + lift * (2 * sum1[c] * by_pixel + lift)) * by_channel;
  }
  block_sum(variance);
  if (variance[0] < 0) variance[0] = 0;  // by rounding; NaN stays
  const float rstd = __frcp_rn(__fsqrt_rn(variance[0] + op.eps));
  for (int c = thread; c < group; c += kGroupThreads) {
    const int at = static_cast<int>(first) + c;
    const float film = 1 + value(op.scale, sample, at, 0), gain = value(op.weight, 0, at, 1) * film * rstd;
    row[kGain * row_step + c] = gain;
    row[kOffset * row_step + c] =
        value(op.bias, 0, at, 0) * film + value(op.shift, sample, at, 0) + lifts[c] * gain;
    row[kRstd * row_step + c] = rstd;
    row[kSum * row_step + c] = sum1[c] + lifts[c] * pixels;
  }
}

template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 1)
    apply_kernel(const GroupNorm op, const Cut cut, const float* rows, T* y, T* concat) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  if (tile.accesses == 0) return;
  Raw<T, V> raw[K];
  tile.load_all(op.x, op.skip, op.x_channels, raw);
  const int64_t step = op.batch * op.channels;
  const float* row = rows + tile.sample * op.channels + tile.first_channel + tile.channel;
  apply(op, tile, raw, row + kMean * step, row + kGain * step, row + kOffset * step, y, concat);
}

// ---- launchers ----

template <typename T, bool kLast>
void resident(const GroupNorm& op, const Cut& cut, bool wide, T* y, T* concat, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch(
        kernel, cut.blocks(op.batch), cut.threads, Channels::bytes(cut, kLast), stream, op, cut, y, concat);
  };
  if (!wide) return run(resident_kernel<T, 1, kMostAccesses, kLast>);
  if (cut.accesses <= 4) return run(resident_kernel<T, kWide<T>, 4, kLast>);
  if (cut.accesses <= 8) return run(resident_kernel<T, kWide<T>, 8, kLast>);
  run(resident_kernel<T, kWide<T>, kMostAccesses, kLast>);
}

template <typename T, bool kLast>
void forward(const GroupNorm& op, T* y, T* concat, float* scratch, cudaStream_t stream) {
  const bool wide = can_be_wide(op, op.x, op.skip, y, concat);
  const int vector = wide ? kWide<T> : 1;
  if (const auto cut = resident_cut(op, vector, kMostAccesses)) {
    return resident<T, kLast>(op, *cut, wide, y, concat, stream);
  }
  const Cut cut = split_cut(op, vector);
  float *slots = scratch, *rows = scratch + 3 * cut.chunks * op.batch * op.channels;
  split_statistics(op, cut, wide, slots, rows, stream);
  const auto run = [&](auto kernel) {
    launch(kernel, cut.blocks(op.batch), cut.threads, 0, stream, op, cut, rows, y, concat);
  };
  wide ? run(apply_kernel<T, kWide<T>, kSplitAccesses, kLast>)
       : run(apply_kernel<T, 1, kSplitAccesses, kLast>);
}

template <typename T, bool kLast>
void partials(const GroupNorm& op, const Cut& cut, bool wide, float* slots, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch(kernel, cut.blocks(op.batch), cut.threads, 4 * sum_slots(cut, kLast), stream, op, cut, slots);
  };
  wide ? run(partials_kernel<T, kWide<T>, kSplitAccesses, kLast>)
       : run(partials_kernel<T, 1, kSplitAccesses, kLast>);
}

}  // namespace

void split_statistics(
    const GroupNorm& op, const Cut& cut, bool wide, float* slots, float* rows, cudaStream_t stream) {
  with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    op.channels_last ? partials<T, true>(op, cut, wide, slots, stream)
                     : partials<T, false>(op, cut, wide, slots, stream);
  });
  launch(finish_kernel, op.batch * op.groups, kGroupThreads, 0, stream, op, cut, slots, rows);
}

int64_t group_norm_scratch(const GroupNorm& op) {
  return split_scratch(op, 3, kStatisticsRows, [](int) { return kMostAccesses; });
}

void group_norm_silu(const GroupNorm& op, void* y, void* concat, float* scratch, cudaStream_t stream) {
  with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *to = static_cast<T*>(y), *copy = static_cast<T*>(concat);
    op.channels_last ? forward<T, true>(op, to, copy, scratch, stream)
                     : forward<T, false>(op, to, copy, scratch, stream);
  });
}

}  // namespace ddpm_fast::cuda
