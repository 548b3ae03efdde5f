// The CUDA kernels' interface: pointers on the device and numbers, no torch.
//
// The ops (q_sample.cpp, ...) check arguments and fill in these structs; the functions (q_sample.cu, ...)
// choose a launch from shape, dtype and alignment, launch on `stream` and return. A failed launch throws
// std::runtime_error. Layouts are dense: contiguous, or where `channels_last` says so channels_last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace ddpm_fast::cuda {

struct PerSample {  // one value a sample: stride 1, or one for all: stride 0
  const int64_t* data;
  int64_t stride;
};

// Where an image lies: contiguous, or {pixels, channels} of a channels_last one. Elements are always counted
// in NCHW order, as the noise is.
struct Layout {
  int64_t pixels = 0, channels = 0;
};

struct QSample {  // x_t = table[t, 0] x0 + table[t, 1] noise
  Dtype dtype;
  int64_t batch, elements;  // of a sample
  const void *x0, *noise;
  void* x_t;
  const float* table;
  int64_t rows;
  PerSample t;
};
void q_sample(const QSample&, cudaStream_t stream);

struct QSampleCounter {  // the same, with the noise drawn and kept
  Dtype dtype;
  int64_t batch, elements;
  Layout layout;  // of x0, x_t and noise
  const void* x0;
  void *x_t, *noise;
  const float* table;
  int64_t rows;
  PerSample t, seed, image_index;
};
void q_sample_counter(const QSampleCounter&, cudaStream_t stream);

struct PosteriorStep {
  Dtype dtype, out_dtype;  // out_dtype is dtype, or a half beside float
  int64_t batch, elements;
  int64_t out_elements;  // of a sample of out: `elements`, or twice that
  Layout out_layout;     // of out; everything else is contiguous
  const void *x, *out;
  const void *noise, *x0_prev;  // null where not given
  void *x_next, *x0;            // x0 null: not stored; x_next may be x, x0 may be x0_prev
  const float* table;
  int64_t rows, columns;           // 7, or 9 with a learned range
  PerSample i, seed, image_index;  // seed.data null: no noise is drawn
  const float* clip_each;          // (batch,), or null
  float clip;
};
void posterior_step(const PosteriorStep&, cudaStream_t stream);

struct CounterNormal {
  int64_t batch, elements;
  float* out;
  PerSample seed, image_index, step;
  int64_t stream;  // what the noise is for: a Stream of philox.h
};
void counter_normal(const CounterNormal&, cudaStream_t stream);

struct Philox {  // the integer stage alone: counter (n, 4), key (n, 2), out (n, 4), uint32 words in int64
  const int64_t *counter, *key;
  int64_t* out;
  int64_t n;
};
void philox4x32_10(const Philox&, cudaStream_t stream);

struct Operand {  // of a norm: (C,) or (B, C) with `stride` from sample to sample; data null: not given
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t stride = 0;
};

struct GroupNorm {
  Dtype dtype;  // of x, skip, y, concat, and in the backward of grad and the gradients by pixel
  bool channels_last;
  int64_t batch, channels, pixels, groups;  // channels: of x and skip together
  const void *x, *skip;  // skip null, or the last channels - x_channels of a virtual concat
  int64_t x_channels;
  Operand weight, bias, add, scale, shift;
  float eps;
  bool silu;
};

// y (B, C, P); concat, if not null, gets [x, skip] as they are. `scratch` has group_norm_scratch floats.
int64_t group_norm_scratch(const GroupNorm&);
void group_norm_silu(const GroupNorm&, void* y, void* concat, float* scratch, cudaStream_t stream);

// Gradients of the parameters by sample, (B, C) float32 each, null where not asked for.
struct GroupNormGradients {
  void *x, *skip;
  float *weight, *bias, *add, *scale, *shift;
};
int64_t group_norm_backward_scratch(const GroupNorm&);
void group_norm_silu_backward(
    const GroupNorm&, const void* grad, const GroupNormGradients&, float* scratch, cudaStream_t stream);

}  // namespace ddpm_fast::cuda
