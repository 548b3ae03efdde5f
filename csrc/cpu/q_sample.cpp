// q_sample and q_sample_counter on the CPU: checks, layouts and threads around kernels/q_sample.h.
#include <tuple>

#include "../checks.h"
#include "../philox.h"
#include "kernels.h"
#include "samples.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kSpan = 4096;  // 16 KB of floats for each operand: they meet in L1

struct Table {
  explicit Table(const Tensor& table)
      : table_(as_contiguous(table)),
        data_(table_.const_data_ptr()),
        doubles_(table.scalar_type() == ScalarType::Double) {}

  double weight(int64_t t, int64_t column) const {
    const int64_t k = 2 * t + column;
    return doubles_ ? static_cast<const double*>(data_)[k] : static_cast<const float*>(data_)[k];
  }

 private:
  Tensor table_;
  const void* data_;
  bool doubles_;
};

// out = a x0 + b noise over one span of any dtype, at most kSpan elements
void mix(Dtype dtype, double a, const void* x0, double b, const void* noise, void* out, int64_t n) {
  const cpu::Kernels& kernels = cpu::kernels();
  if (dtype == Dtype::kDouble) {
    kernels.axpby_double(
        a, static_cast<const double*>(x0), b, static_cast<const double*>(noise), static_cast<double*>(out),
        n);
  } else if (dtype == Dtype::kFloat) {
    kernels.axpby_float(
        a, static_cast<const float*>(x0), b, static_cast<const float*>(noise), static_cast<float*>(out), n);
  } else {
    float x0s[kSpan], noises[kSpan];
    kernels.load(dtype, x0, x0s, n);
    kernels.load(dtype, noise, noises, n);
    kernels.axpby_float(a, x0s, b, noises, x0s, n);
    kernels.store(dtype, x0s, out, n);
  }
}

Tensor q_sample_cpu(Tensor x0, Tensor noise, Tensor t, Tensor table) {
  const Dtype dtype = dtype_of("x0", x0);
  check_like("noise", noise, x0, "x0");
  check_q_sample(x0, table);
  const Table weights(table);
  const int64_t batch = x0.size(0), elements = batch == 0 ? 0 : x0.numel() / batch;
  const PerSample times("t", t, batch);
  times.check_range("t", table.size(0));
  x0 = keep_layout(x0);
  noise = like_layout(noise, x0);
  Tensor out = empty_as(x0);
  parallel_spans(batch, elements, kSpan, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t k = b * elements + begin;
    mix(dtype, weights.weight(times[b], 0), at(x0, dtype, k), weights.weight(times[b], 1),
        at(noise, dtype, k), mutable_at(out, dtype, k), end - begin);
  });
  return out;
}

std::tuple<Tensor, Tensor> q_sample_counter_cpu(
    Tensor x0, Tensor t, Tensor table, Tensor seed, Tensor image_index) {
  const Dtype dtype = dtype_of("x0", x0);
  check_q_sample(x0, table);
  const Table weights(table);
  const int64_t batch = x0.size(0), elements = batch == 0 ? 0 : x0.numel() / batch;
  const PerSample times("t", t, batch), seeds("seed", seed, batch), images("image_index", image_index, batch);
  times.check_range("t", table.size(0));
  // Noise is counted in NCHW order, so that is the order it is drawn and mixed in.
  const bool channels_last = is_channels_last(x0);
  Tensor x = as_contiguous(x0);
  Tensor noise = empty_as(x), out = empty_as(x);
  parallel_spans(batch, elements, kSpan, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t k = b * elements + begin, n = end - begin;
    float drawn[kSpan];
    float* z = dtype == Dtype::kFloat ? reinterpret_cast<float*>(mutable_at(noise, dtype, k)) : drawn;
    cpu::kernels().normal(seeds[b], stream_step(kStreamTraining, 0), images[b], begin, z, n);
    if (z == drawn) cpu::kernels().store(dtype, drawn, mutable_at(noise, dtype, k), n);
    mix(dtype, weights.weight(times[b], 0), at(x, dtype, k), weights.weight(times[b], 1), at(noise, dtype, k),
        mutable_at(out, dtype, k), n);
  });
  if (!channels_last) return {out, noise};
  return {to_channels_last(out), to_channels_last(noise)};
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample_cpu));
  m.impl("q_sample_forward", TORCH_BOX(&q_sample_cpu));
  m.impl("q_sample_counter", TORCH_BOX(&q_sample_counter_cpu));
  m.impl("q_sample_counter_forward", TORCH_BOX(&q_sample_counter_cpu));
}

}  // namespace
}  // namespace ddpm_fast
