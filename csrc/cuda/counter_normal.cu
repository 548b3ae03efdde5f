// Counter noise, and its integer stage by itself:
//
//   out[b, e] = normal(seed[b], image_index[b], stream << 28 | step[b], e)      (noise.cuh)
//
// out (B, ...) float32, contiguous. One launch; reads nothing an element and writes 4 bytes; float32.

#include "device.cuh"
#include "kernels.h"
#include "noise.cuh"
#include "span.cuh"

namespace ddpm_fast::cuda {
namespace {

constexpr int kElements = kWide<float>;

template <bool kWideAccess>
__global__ void __launch_bounds__(kThreads) counter_normal_kernel(CounterNormal args, Spans spans) {
  const Place at = place<kElements>(spans);
  if (at.left <= 0) return;
  const Draw draw = {
      of_sample<uint64_t>(args.seed, at.sample), of_sample<uint64_t>(args.image_index, at.sample),
      stream_step(args.stream, of_sample<int64_t>(args.step, at.sample))};
  float z[kElements];
  normal(draw, at.first, z);
  store_span<kWideAccess>(args.out + at.sample * spans.elements + at.first, at.left, z);
}

__global__ void __launch_bounds__(kThreads) philox4x32_10_kernel(Philox args) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= args.n) return;
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = static_cast<uint32_t>(args.counter[4 * k + j]);
  const int64_t* key = args.key + 2 * k;
  ddpm_fast::philox4x32_10(words, static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]));
#pragma unroll
  for (int j = 0; j < 4; ++j) args.out[4 * k + j] = words[j];
}

}  // namespace

void counter_normal(const CounterNormal& args, cudaStream_t stream) {
  if (args.batch * args.elements == 0) return;
  const Spans spans = spans_of(args.batch, args.elements, kElements);
  const bool wide = aligned(args.out) && args.elements % kElements == 0;
  launch(
      wide ? counter_normal_kernel<true> : counter_normal_kernel<false>, spans.grid, spans.threads, 0, stream,
      args, spans);
}

void philox4x32_10(const Philox& args, cudaStream_t stream) {
  if (args.n == 0) return;
  launch(philox4x32_10_kernel, (args.n + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace ddpm_fast::cuda
