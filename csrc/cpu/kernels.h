// The CPU kernels' interface: spans of memory and numbers, no torch.
//
// kernels.cpp is compiled once for each instruction set, each time into a table of functions; isa.cpp chooses
// the table at the first call. The ops (q_sample.cpp, ...) check arguments, split the work over threads and
// call through the table.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ddpm_fast::cpu {

struct StepRow {  // one row of a sampler's table, and the bound on |x0|
  double x0_from_x, x0_from_out;
  double x_from_x0, x_from_x, x_from_out, x_from_x0_prev, x_from_noise;
  double min_log, max_log, clip;
};

template <typename T>
struct StepSpan {  // null where an operand is not there
  const T *x, *out, *log_variance_fraction, *x0_prev, *noise;
  T *x_next, *x0;
};

struct GroupNormArgs {  // pointers at the first channel of the span, null where not given
  const float *weight, *bias, *add, *scale, *shift;
  double eps;
  bool silu;
};

struct GroupNormGradients {  // likewise; of one sample
  float *weight, *bias, *add, *scale, *shift;
};

// Channels that lie together: a norm reads x, and after it the skip of a virtual concatenation.
struct GroupNormSource {
  const void* data;
  int64_t channels;  // 0: no such source
  int64_t stride;    // from a pixel to the next, where channels are last
};
struct GroupNormSources {
  GroupNormSource of[2];
};

// What a 3x3 convolution, padded by 1, does to height and width: kUp, every pixel stands four times, as
// nearest neighbours twice as large; kDown, stride 2.
enum class Resize : int64_t { kNone, kUp, kDown };

struct Conv3x3Shape {
  int64_t batch, height, width, in_channels, out_channels;  // height and width: of inputs
  int64_t shift = 0;  // or 1: the first window begins at the first pixel, and only the last ones are padded

  int64_t resized(Resize resize, int64_t side) const {
    return resize == Resize::kNone ? side : resize == Resize::kUp ? 2 * side : (side + 1 - shift) / 2;
  }
};

// How a convolution is cut; sizes in floats.
struct Conv3x3Plan : Conv3x3Shape {
  int64_t out_height, out_width;
  int64_t tiles;        // of the batch
  int64_t block;        // tiles that are worked on together, at most
  int64_t blocks;       // a multiple of the threads, where there are so many
  int64_t panels;       // of output channels
  int64_t panel_size;   // of a panel's packed weights
  int64_t packed;       // of all of them, and what fills 32 channels
  int64_t transformed;  // of a block's transformed inputs
  int64_t products;     // of a panel's products with them
  int64_t scratch;      // of what `transform` needs besides, and `pack` for each of a panel's channels
  int64_t pixels;       // of what `transform` needs after that for an input that is prepared
};

// A norm as numbers of each channel, in rows: center, gain and offset of (x - center) gain + offset, and a
// bound of |x - center|.
constexpr int64_t kFoldRows = 4;

// Channels of x, and after them those of skip, as they are or through a norm.
struct Conv3x3Input {
  const void* x;
  const void* skip = nullptr;   // null: x has all channels
  int64_t split = 0;            // x's channels, where the input is not plain
  const float* fold = nullptr;  // of each image; null: no norm
  bool silu = false;            // after the norm

  bool is_plain() const { return skip == nullptr && fold == nullptr; }
};

// Where the taps of output channel k and input channel c lie.
template <typename T>
struct Conv3x3Weight {
  T* first;
  int64_t step_k, step_c, step_tap;

  T* at(int64_t k, int64_t c, int64_t tap) const { return first + k * step_k + c * step_c + tap * step_tap; }
};

// In tiles of down x across outputs. x, plus and y are channels last, all float32 or all bfloat16; bias and
// plus may be null.
struct Conv3x3Kernels {
  int64_t taps, down, across;  // taps: 3, or 1 for a linear layer on the pixels
  Resize resize;

  Conv3x3Plan (*plan)(const Conv3x3Shape&, int64_t threads);
  // panels [first, last) of the weights
  void (*pack)(
      const Conv3x3Plan&, const Conv3x3Weight<const float>&, int64_t first, int64_t last, float* packed,
      float* scratch);
  // before a thread's first `transform`: nothing is prepared yet
  void (*begin)(const Conv3x3Plan&, const Conv3x3Input&, float* scratch);
  // tiles [first, last) of a block, or as many of them as there are; then panels [first, last) of its outputs
  void (*transform)(
      const Conv3x3Plan&, const Conv3x3Input&, int64_t block, int64_t first, int64_t last, float* transformed,
      float* scratch);
  void (*run)(
      const Conv3x3Plan&, const float* transformed, const float* packed, const float* bias, const void* plus,
      void* y, int64_t block, int64_t first, int64_t last, float* products);
};

// The gradients to its weight and bias: sums over blocks of tiles of `plan`, whose `transformed`, `products`
// and `packed` are the sizes of a block's inputs, of its gradients, and of the sums.
struct Conv3x3GradientKernels {
  int64_t tasks;  // of a panel

  Conv3x3Plan (*plan)(const Conv3x3Shape&);
  // tiles [first, last) of a block, or as many of them as there are; then tasks [first, last) of all panels
  void (*transform)(
      const Conv3x3Plan&, const float* x, const float* grad, int64_t block, int64_t first, int64_t last,
      float* inputs, float* gradients);
  void (*accumulate)(
      const Conv3x3Plan&, const float* inputs, const float* gradients, int64_t block, int64_t first,
      int64_t last, float* sums);
  // panels [first, last) of the weight's and the bias's
  void (*finish)(
      const Conv3x3Plan&, const float* sums, int64_t first, int64_t last, const Conv3x3Weight<float>& weight,
      float* bias);
};

// How the attention of one head is cut; sizes in floats.
struct AttentionPlan {
  int64_t tokens, width;  // width: channels of the head
  int64_t block, blocks;  // of queries
  int64_t chunk, chunks;  // of keys
  int64_t pieces;         // in which keys and values are laid out
  int64_t laid_out;       // of all of them
  int64_t scratch;        // of what a block of queries, or laying out, needs
};

struct AttentionHead {
  const void *q, *k, *v;
  int64_t stride;  // in elements, from a token to the next
  void* y;
  int64_t y_stride;
};

struct AttentionKernels {
  AttentionPlan (*plan)(int64_t tokens, int64_t width, int64_t threads);
  // pieces [first, last) of the keys and values; then blocks [first, last) of the queries
  void (*lay_out)(
      const AttentionPlan&, const AttentionHead&, int64_t first, int64_t last, float* to, float* scratch);
  void (*attend)(
      const AttentionPlan&, const AttentionHead&, const float* laid_out, int64_t first, int64_t last,
      float* scratch);
};

struct Kernels {
  const char* isa;

  // to and from float32
  void (*load)(Dtype, const void* from, float* to, int64_t n);
  void (*store)(Dtype, const float* from, void* to, int64_t n);

  // out = a x + b y
  void (*axpby_float)(double a, const float* x, double b, const float* y, float* out, int64_t n);
  void (*axpby_double)(double a, const double* x, double b, const double* y, double* out, int64_t n);

  // elements [begin, begin + n) of an image's noise; begin is a multiple of 4
  void (*normal)(uint64_t seed, uint32_t stream_step, uint64_t image, int64_t begin, float* out, int64_t n);

  // all elements of `count` images, of which each has few
  void (*normal_each)(
      uint64_t seed, uint32_t stream_step, const int64_t* images, int64_t count, int64_t elements,
      float* out);

  // elements [begin, begin + n) in the order of memory; x and y point to the first. begin is a multiple of
  // 1024. dtype: not double
  void (*dropout)(Dtype, uint64_t seed, int64_t threshold, int64_t begin, const void* x, void* y, int64_t n);

  void (*posterior_step_float)(const StepRow&, const StepSpan<float>&, int64_t n);
  void (*posterior_step_double)(const StepRow&, const StepSpan<double>&, int64_t n);

  // one sample, whole groups, channels last; rows of y, and of concat (the sources as they are, or null), are
  // `stride` apart. scratch: group_norm_scratch(channels) floats, 8-byte aligned
  void (*group_norm_nhwc)(
      Dtype, const GroupNormSources&, void* y, void* concat, int64_t pixels, int64_t stride, int64_t channels,
      int64_t channels_per_group, const GroupNormArgs&, float* scratch);
  // the same with channels one after another: the sources' strides are not read
  void (*group_norm_nchw)(
      Dtype, const GroupNormSources&, void* y, void* concat, int64_t pixels, int64_t channels_per_group,
      int64_t groups, const GroupNormArgs&);

  // kFoldRows rows of numbers that are `step` apart, instead of y; channels last
  void (*group_norm_fold)(
      Dtype, const GroupNormSources&, float* to, int64_t step, int64_t pixels, int64_t channels,
      int64_t channels_per_group, const GroupNormArgs&, float* scratch);

  // their gradients, of one source. scratch: group_norm_backward_scratch(channels) floats, 8-byte aligned
  void (*group_norm_backward_nhwc)(
      Dtype, const void* grad, const void* x, void* grad_x, int64_t pixels, int64_t stride, int64_t channels,
      int64_t channels_per_group, const GroupNormArgs&, const GroupNormGradients&, float* scratch);
  void (*group_norm_backward_nchw)(
      Dtype, const void* grad, const void* x, void* grad_x, int64_t pixels, int64_t channels_per_group,
      int64_t groups, const GroupNormArgs&, const GroupNormGradients&, float* scratch);

  Conv3x3Kernels conv3x3[8], conv3x3_bfloat16[8];
  Conv3x3GradientKernels conv3x3_gradient;

  AttentionKernels attention_float, attention_bfloat16;

  uint64_t (*fingerprint)(const void* data, int64_t bytes);
};

// Twelve floats a channel, with two sources' last registers filled up to 32 channels.
constexpr int64_t padded_channels(int64_t channels) { return (channels + 2 * 31 + 63) / 64 * 64; }
constexpr int64_t group_norm_scratch(int64_t channels) { return 12 * padded_channels(channels); }
constexpr int64_t group_norm_backward_scratch(int64_t channels) { return 23 * padded_channels(channels); }

// The table in use: the best this processor runs, or the one that DDPM_FAST_CPU names.
const Kernels& kernels();

}  // namespace ddpm_fast::cpu
