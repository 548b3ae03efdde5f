// The gradient of `group_norm_silu` to x, weight, bias, add, scale and shift.
//
// With h = x + add - mean, n = h rstd, gain = (1 + scale) weight, y as in the forward and g = grad act'(y):
//
//     grad_x = rstd (gain g - E[gain g] - n E[gain g n]) = p g + q h + r, E over a group
//     A = sum of g, N = sum of g n, over pixels:  grad_shift = A,  grad_scale = weight N + bias A,
//     by sample: grad_bias = (1 + scale) A,  grad_weight = (1 + scale) N;  grad_add = sum of grad_x over
//     pixels
//
// Nothing but the inputs was kept: the statistics are taken anew, and y twice rather than stored.
//
// resident    x and grad stay in registers: one launch, two reads and a write (6 bytes an element in
// bfloat16). split       larger: the forward's statistics, `sums` (A and N by chunk, each in a slot of its
// own), `spread`
//             (merges the slots into what `apply` needs), `apply`. Five reads and a write, same bits every
//             run.
#include "group_norm.cuh"

namespace ddpm_fast::cuda {
namespace {

// 32 registers of pixels and 32 of their gradients; half of that where a thread also has sums of eight
// channels.
constexpr int most_accesses(bool channels_last, int vector) { return channels_last && vector == 8 ? 4 : 8; }

enum SpreadRow { kP = kStatisticsRows, kQ, kR, kRows };

// grad act'(y); sigmoid(y) and 1 - sigmoid(y) each to its own last digits, whatever the sign of y.
__device__ __forceinline__ float before_silu(float grad, float y) {
  const float power = __expf(-fabsf(y)), large = __frcp_rn(1 + power), small = power * large;
  const float gate = y < 0 ? small : large, rest = y < 0 ? large : small;
  return grad * gate * (1 + y * rest);
}

// What the thread needs of each of its channels.
struct Channel {
  const float *mean, *gain, *offset, *lift;
};

// f(v, h, g, channel) for the elements of an access; `channel` is the thread's own number of v's.
template <typename T, int V, int K, bool kLast, typename F>
__device__ __forceinline__ void before_norm(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const Raw<T, V>& x, const Raw<T, V>& grad,
    const Channel& rows, const F& f) {
  float h[V], g[V];
  tile.unpack_anew(x, h);
  tile.unpack_anew(grad, g);
#pragma unroll
  for (int first = 0; first < V; first += tile.kRun) {
    const int at = tile.channel_of(first);
    float mean[tile.kRunChannels], gain[tile.kRunChannels], offset[tile.kRunChannels],
        lift[tile.kRunChannels];
    read(rows.mean + at, mean);
    read(rows.gain + at, gain);
    read(rows.offset + at, offset);
    read(rows.lift + at, lift);
#pragma unroll
    for (int v = 0; v < tile.kRun; ++v) {
      const int c = tile.channel_of(v);
      const float rest = h[first + v] - mean[c];
      float before = g[first + v];
      if (op.silu) before = before_silu(before, rest * gain[c] + offset[c]);
      f(first + v, rest + lift[c], before, at + c);
    }
  }
}

// Sums of g and g h over the tile's pixels, by channel of the thread.
template <typename T, int V, int K, bool kLast>
__device__ inline void sums_of_gradients(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const Raw<T, V> (&x)[K],
    const Raw<T, V> (&grad)[K], const Channel& channel, float* slots,
    float (&sums)[2][Tile<T, V, K, kLast>::kChannels]) {
#pragma unroll
  for (int c = 0; c < tile.kChannels; ++c) sums[0][c] = sums[1][c] = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= tile.accesses) break;
    before_norm(op, tile, x[k], grad[k], channel, [&](int, float h, float g, int c) {
      sums[0][c] += g;
      sums[1][c] += g * h;
    });
  }
  tile.sum(sums, slots);
}

struct Through {
  float p, q, r;
};

// What grad_x = p g + q h + r is made of, from the sums of g, g h and h over a group's channels; and the
// gradients of channel c, of which this thread is in charge. The pointers are at the group's first channel.
__device__ inline Through through_norm(
    const GroupNorm& op, const GroupNormGradients& gradients, int64_t sample, int64_t first, int c, int group,
    float g, float gh, float gain, float mean1, float mean2, float sum_h, float rstd) {
  const float by_element = 1 / (static_cast<float>(op.pixels) * static_cast<float>(group));
  mean1 *= by_element;
  mean2 *= by_element;
  const Through to = {gain, -rstd * rstd * mean2, -mean1};

  const int channel = static_cast<int>(first) + c;
  const int64_t at = sample * op.channels + channel;
  const float film = 1 + value(op.scale, sample, channel, 0), a = g, n = rstd * gh;
  if (gradients.weight != nullptr) gradients.weight[at] = film * n;
  if (gradients.bias != nullptr) gradients.bias[at] = film * a;
  if (gradients.add != nullptr) {
    gradients.add[at] = to.p * a + to.q * sum_h + to.r * static_cast<float>(op.pixels);
  }
  if (gradients.scale != nullptr) {
    gradients.scale[at] = value(op.weight, 0, channel, 1) * n + value(op.bias, 0, channel, 0) * a;
  }
  if (gradients.shift != nullptr) gradients.shift[at] = a;
  return to;
}

template <typename T, int V, int K, bool kLast>
__device__ inline void apply(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const Raw<T, V> (&x)[K],
    const Raw<T, V> (&grad)[K], const Channel& channel, const float* p, const float* q, const float* r,
    T* to_x, T* to_skip) {
  int64_t start, along;
  T* to = tile.choose(to_x, to_skip, op.x_channels, start, along);
  if (to == nullptr) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= tile.accesses) break;
    float result[V];
    before_norm(op, tile, x[k], grad[k], channel, [&](int v, float h, float g, int c) {
      result[v] = p[c] * g + (q[c] * h + r[c]);
    });
    store<V>(to + start + k * along, pack<T, V>(result));
  }
}

// ---- one launch ----

template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kMostThreads, 1) resident_backward_kernel(
    const GroupNorm op, const Cut cut, const T* grad, const GroupNormGradients gradients) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  const Channels channels(cut.width, 5);
  float *sum_g = channels.rstd + cut.width, *sum_gh = sum_g + cut.width;
  float *p = sum_gh + cut.width, *q = p + cut.width, *r = q + cut.width;

  Raw<T, V> x[K], g[K];
  tile.load_all(op.x, op.skip, op.x_channels, x);
  tile.load_all(grad, nullptr, op.channels, g);
  float sums[2][Here::kChannels];
  normalise(op, tile, x, channels);

  const Channel channel = {
      channels.mean + tile.channel, channels.gain + tile.channel, channels.offset + tile.channel,
      channels.lift + tile.channel};
  sums_of_gradients(op, tile, x, g, channel, channels.slots, sums);
  if (tile.leads()) {
#pragma unroll
    for (int c = 0; c < Here::kChannels; ++c) {
      sum_g[tile.channel + c] = sums[0][c];
      sum_gh[tile.channel + c] = sums[1][c];
    }
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c < cut.width && tile.first_channel + c < tile.channels) {
    const int group = static_cast<int>(op.channels / op.groups), first = c / group * group;
    const float sum_h = channels.sum1[c] + channels.lift[c] * tile.count;
    float mean1 = 0, mean2 = 0;  // `gain` holds weight (1 + scale) rstd: rstd E[gain g], rstd E[gain g h]
    for (int j = first; j < first + group; ++j) {
      mean1 += channels.gain[j] * sum_g[j];
      mean2 += channels.gain[j] * sum_gh[j];
    }
    const Through to = through_norm(
        op, gradients, tile.sample, tile.first_channel + first, c - first, group, sum_g[c], sum_gh[c],
        channels.gain[c], mean1, mean2, sum_h, channels.rstd[c]);
    p[c] = to.p;
    q[c] = to.q;
    r[c] = to.r;
  }
  __syncthreads();
  apply(
      op, tile, x, g, channel, p + tile.channel, q + tile.channel, r + tile.channel,
      static_cast<T*>(gradients.x), static_cast<T*>(gradients.skip));
}

// ---- split ----

template <typename T, int V, int K, bool kLast>
__device__ inline Channel channel_of(
    const GroupNorm& op, const Tile<T, V, K, kLast>& tile, const float* rows) {
  const int64_t step = op.batch * op.channels;
  const float* row = rows + tile.sample * op.channels + tile.first_channel + tile.channel;
  return {row + kMean * step, row + kGain * step, row + kOffset * step, row + kLift * step};
}

// slots (2, B, chunks, C): sums of g and of g h.
template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 1)
    sums_kernel(const GroupNorm op, const Cut cut, const T* grad, const float* rows, float* slots) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  Raw<T, V> x[K], g[K];
  tile.load_all(op.x, op.skip, op.x_channels, x);
  tile.load_all(grad, nullptr, op.channels, g);
  float sums[2][Here::kChannels];
  sums_of_gradients(op, tile, x, g, channel_of(op, tile, rows), dynamic_shared<float>(), sums);
  if (!tile.leads()) return;
  float* slot =
      slots + (tile.sample * cut.chunks + tile.chunk) * op.channels + tile.first_channel + tile.channel;
#pragma unroll
  for (int c = 0; c < Here::kChannels; ++c) {
    slot[c] = sums[0][c];
    slot[c + op.batch * cut.chunks * op.channels] = sums[1][c];
  }
}

// Rows kP, kQ and kR from the slots, and the parameters' gradients. A block has one group, a warp a channel
// at a time.
__global__ void __launch_bounds__(kGroupThreads) spread_kernel(
    const GroupNorm op, const Cut cut, const float* slots, float* rows, const GroupNormGradients gradients) {
  const int group = static_cast<int>(op.channels / op.groups);
  const int64_t sample = blockIdx.x / op.groups, first = blockIdx.x % op.groups * group;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t step = op.batch * cut.chunks * op.channels, row_step = op.batch * op.channels;
  float* row = rows + sample * op.channels + first;
  float *sum_g = row + kP * row_step, *sum_gh = row + kQ * row_step;
  const float* gain = row + kGain * row_step;
  for (int c = warp; c < group; c += kGroupThreads / kWarp) {
    const float* slot = slots + sample * cut.chunks * op.channels + first + c;
    float sums[2] = {0, 0};
    for (int k = lane; k < cut.chunks; k += kWarp) {
      sums[0] += slot[k * op.channels];
      sums[1] += slot[k * op.channels + step];
    }
    warp_sum(sums);
    if (lane == 0) {
      sum_g[c] = sums[0];
      sum_gh[c] = sums[1];
    }
  }
  __syncthreads();
  float means[2] = {0, 0};
  for (int c = static_cast<int>(threadIdx.x); c < group; c += kGroupThreads) {
    means[0] += gain[c] * sum_g[c];
    means[1] += gain[c] * sum_gh[c];
  }
  block_sum(means);
  for (int c = static_cast<int>(threadIdx.x); c < group; c += kGroupThreads) {
    const Through to = through_norm(
        op, gradients, sample, first, c, group, sum_g[c], sum_gh[c], gain[c], means[0], means[1],
        row[kSum * row_step + c], row[kRstd * row_step + c]);
    row[kP * row_step + c] = to.p;
    row[kQ * row_step + c] = to.q;
    row[kR * row_step + c] = to.r;
  }
}

template <typename T, int V, int K, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 1) apply_kernel(
    const GroupNorm op, const Cut cut, const T* grad, const float* rows, const GroupNormGradients gradients) {
  using Here = Tile<T, V, K, kLast>;
  const Here tile(op, cut);
  if (tile.accesses == 0) return;
  Raw<T, V> x[K], g[K];
  tile.load_all(op.x, op.skip, op.x_channels, x);
  tile.load_all(grad, nullptr, op.channels, g);
  const Channel channel = channel_of(op, tile, rows);
  const int64_t step = op.batch * op.channels;
  apply(
      op, tile, x, g, channel, channel.mean + kP * step, channel.mean + kQ * step, channel.mean + kR * step,
      static_cast<T*>(gradients.x), static_cast<T*>(gradients.skip));
}

// ---- launchers ----

template <typename T, bool kLast>
void resident(
    const GroupNorm& op, const Cut& cut, bool wide, const T* grad, const GroupNormGradients& gradients,
    cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch(
        kernel, cut.blocks(op.batch), cut.threads, Channels::bytes(cut, kLast, 5), stream, op, cut, grad,
        gradients);
  };
  if (!wide) return run(resident_backward_kernel<T, 1, most_accesses(kLast, 1), kLast>);
  if (cut.accesses <= 4) return run(resident_backward_kernel<T, kWide<T>, 4, kLast>);
  run(resident_backward_kernel<T, kWide<T>, most_accesses(kLast, kWide<T>), kLast>);
}

template <typename T, int V, bool kLast>
void split(
    const GroupNorm& op, const T* grad, const GroupNormGradients& gradients, float* scratch,
    cudaStream_t stream) {
  const Cut cut = split_cut(op, V);
  float *slots = scratch, *rows = scratch + 3 * cut.chunks * op.batch * op.channels;
  split_statistics(op, cut, V > 1, slots, rows, stream);
  const int64_t blocks = cut.blocks(op.batch);
  launch(
      sums_kernel<T, V, kSplitAccesses, kLast>, blocks, cut.threads, 4 * sum_slots(cut, kLast), stream, op,
      cut, grad, static_cast<const float*>(rows), slots);
  launch(spread_kernel, op.batch * op.groups, kGroupThreads, 0, stream, op, cut, slots, rows, gradients);
  launch(
      apply_kernel<T, V, kSplitAccesses, kLast>, blocks, cut.threads, 0, stream, op, cut, grad, rows,
      gradients);
}

template <typename T, bool kLast>
void backward(
    const GroupNorm& op, const T* grad, const GroupNormGradients& gradients, float* scratch,
    cudaStream_t stream) {
  const bool wide = can_be_wide(op, op.x, op.skip, grad, gradients.x, gradients.skip);
  const int vector = wide ? kWide<T> : 1;
  if (const auto cut = resident_cut(op, vector, most_accesses(kLast, vector))) {
    return resident<T, kLast>(op, *cut, wide, grad, gradients, stream);
  }
  wide ? split<T, kWide<T>, kLast>(op, grad, gradients, scratch, stream)
       : split<T, 1, kLast>(op, grad, gradients, scratch, stream);
}

}  // namespace

int64_t group_norm_backward_scratch(const GroupNorm& op) {
  return split_scratch(op, 3, kRows, [&](int vector) { return most_accesses(op.channels_last, vector); });
}

void group_norm_silu_backward(
    const GroupNorm& op, const void* grad, const GroupNormGradients& gradients, float* scratch,
    cudaStream_t stream) {
  with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad);
    op.channels_last ? backward<T, true>(op, from, gradients, scratch, stream)
                     : backward<T, false>(op, from, gradients, scratch, stream);
  });
}

}  // namespace ddpm_fast::cuda
