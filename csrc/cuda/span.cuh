// How a pointwise kernel is cut: a block takes consecutive elements of one sample, a thread E of them.
//
// The grid is flat, since a CUDA grid's second axis ends at 65535 samples. E is what one 16-byte access of
// the narrowest operand holds. A kernel is compiled for two kinds of access: of 16 bytes, which takes
// operands that are aligned and samples of a multiple of E elements, as images are; and element by element
// for all the rest.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../dtype.h"
#include "kernels.h"
#include "vec.cuh"

namespace ddpm_fast::cuda {

constexpr int kThreads = 128;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Spans {
  int64_t elements;  // of a sample
  uint32_t blocks;   // of a sample
  int64_t grid, threads;
};

inline Spans spans_of(int64_t batch, int64_t elements, int per_thread) {
  const int64_t needed = (elements + per_thread - 1) / per_thread;  // threads for a sample
  const int64_t threads = std::min<int64_t>(kThreads, (needed + 31) / 32 * 32);
  const int64_t blocks = (needed + threads - 1) / threads;
  return {elements, static_cast<uint32_t>(blocks), batch * blocks, threads};
}

struct Place {  // a thread's elements
  int64_t sample, first;
  int64_t left;  // elements of the sample from `first` on; none: nothing to do
};

template <int E>
__device__ __forceinline__ Place place(const Spans& spans) {
  const uint32_t sample = blockIdx.x / spans.blocks;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x - sample * spans.blocks) * blockDim.x + threadIdx.x) * E;
  return {sample, first, spans.elements - first};
}

template <typename Value>
__device__ __forceinline__ Value of_sample(const PerSample& values, int64_t sample) {
  return static_cast<Value>(values.data[sample * values.stride]);
}

// Where the sample's elements first, first + 1, ..., counted in NCHW order, lie from the sample's first.
class Walk {
 public:
  __device__ __forceinline__ Walk(const Layout& layout, int64_t first)
      : pixels_(layout.pixels), channels_(layout.channels), channel_(first / pixels_) {
    pixel_ = first - channel_ * pixels_;
  }

  __device__ __forceinline__ int64_t next() {
    const int64_t offset = pixel_ * channels_ + channel_;
    if (++pixel_ == pixels_) {
      pixel_ = 0;
      ++channel_;
    }
    return offset;
  }

 private:
  int64_t pixels_, channels_, channel_, pixel_;
};

// A contiguous image as one of a single channel.
inline Layout dense(const Layout& layout, int64_t elements) {
  return layout.channels != 0 ? layout : Layout{elements, 1};
}

template <int E>
__device__ __forceinline__ void fill(float (&x)[E], float value) {
#pragma unroll
  for (int k = 0; k < E; ++k) x[k] = value;
}

template <bool kWideAccess, int E, typename T>
__device__ __forceinline__ void load_span(const T* from, int64_t left, float (&x)[E]) {
  if constexpr (kWideAccess) {
    constexpr int V = kWide<T>;
#pragma unroll
    for (int k = 0; k < E; k += V) {
      float part[V];
      unpack<T, V>(load<V>(from + k), part);
#pragma unroll
      for (int j = 0; j < V; ++j) x[k + j] = part[j];
    }
  } else {
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = k < left ? to_float(from[k]) : 0.0f;
  }
}

template <bool kWideAccess, int E, typename T>
__device__ __forceinline__ void store_span(T* to, int64_t left, const float (&x)[E]) {
  if constexpr (kWideAccess) {
    constexpr int V = kWide<T>;
#pragma unroll
    for (int k = 0; k < E; k += V) {
      float part[V];
#pragma unroll
      for (int j = 0; j < V; ++j) part[j] = x[k + j];
      store<V>(to + k, pack<T, V>(part));
    }
  } else {
#pragma unroll
    for (int k = 0; k < E; ++k) {
      if (k < left) to[k] = from_float<T>(x[k]);
    }
  }
}

// The same, element by element, where `walk` leads.
template <int E, typename T>
__device__ __forceinline__ void load_walk(const T* from, Walk walk, int64_t left, float (&x)[E]) {
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const int64_t offset = walk.next();
    x[k] = k < left ? to_float(from[offset]) : 0.0f;
  }
}

template <int E, typename T>
__device__ __forceinline__ void store_walk(T* to, Walk walk, int64_t left, const float (&x)[E]) {
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const int64_t offset = walk.next();
    if (k < left) to[offset] = from_float<T>(x[k]);
  }
}

}  // namespace ddpm_fast::cuda
