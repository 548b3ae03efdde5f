// posterior_step and posterior_step_ on the CPU: checks, rows and threads around kernels/posterior_step.h.
#include <algorithm>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../philox.h"
#include "kernels.h"
#include "samples.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kSpan = 1024;  // six operands of 4 KB: they meet in L1

struct Step {  // the checked, contiguous operands of one call
  Tensor x, out, table, i;
  OptionalTensor noise, seed, image_index, x0_prev, clip_each;
  double clip;
};

cpu::StepRow row_of(const Step& step, int64_t i, int64_t b) {
  const int64_t columns = step.table.size(1);
  double values[9] = {};
  if (step.table.scalar_type() == ScalarType::Double) {
    const auto* row = static_cast<const double*>(step.table.const_data_ptr()) + i * columns;
    std::copy(row, row + columns, values);
  } else {
    const auto* row = static_cast<const float*>(step.table.const_data_ptr()) + i * columns;
    std::copy(row, row + columns, values);
  }
  const double clip =
      step.clip_each ? static_cast<const float*>(step.clip_each->const_data_ptr())[b] : step.clip;
  return {values[0], values[1], values[2], values[3], values[4],
          values[5], values[6], values[7], values[8], clip};
}

// T is what is computed in: float, or double for a double x.
template <typename T>
void run(const Step& step, Tensor& x_next, OptionalTensor& x0) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t batch = step.x.size(0), elements = step.x.numel() / std::max<int64_t>(batch, 1);
  const int64_t out_elements = step.out.numel() / std::max<int64_t>(batch, 1);
  const bool learned = step.table.size(1) == 9;
  const Dtype dtype = dtype_of("x", step.x), out_dtype = dtype_of("out", step.out);
  const PerSample rows("i", step.i, batch);
  rows.check_range("i", step.table.size(0));
  for (int64_t b = 0; b < batch; ++b) {
    const cpu::StepRow row = row_of(step, rows[b], b);
    check(row.x_from_x0_prev == 0 || step.x0_prev, "x0_prev is missing, and row i of the table needs it");
    check(
        row.x_from_noise == 0 || step.noise || step.seed,
        "noise or seed is missing, and row i of the table needs it");
  }
  const PerSample none("i", step.i, batch);
  const PerSample seeds = step.seed ? PerSample("seed", *step.seed, batch) : none;
  const PerSample images = step.image_index ? PerSample("image_index", *step.image_index, batch) : none;

  parallel_spans(batch, elements, kSpan, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t n = end - begin, k = b * elements + begin, k_out = b * out_elements + begin;
    const cpu::StepRow row = row_of(step, rows[b], b);
    constexpr bool kDouble = std::is_same_v<T, double>;

    // An operand as T: where it lies if it is so already, else converted into a buffer.
    const auto view = [&](const Tensor& from, Dtype from_dtype, int64_t element, T* buffer) -> const T* {
      if constexpr (kDouble) {
        return reinterpret_cast<const T*>(at(from, from_dtype, element));
      } else {
        if (from_dtype == Dtype::kFloat) return reinterpret_cast<const T*>(at(from, from_dtype, element));
        kernels.load(from_dtype, at(from, from_dtype, element), buffer, n);
        return buffer;
      }
    };
    T x_buffer[kSpan], out_buffer[kSpan], v_buffer[kSpan], history_buffer[kSpan], noise_buffer[kSpan];
    cpu::StepSpan<T> span = {};
    span.x = view(step.x, dtype, k, x_buffer);
    span.out = view(step.out, out_dtype, k_out, out_buffer);
    if (learned) span.log_variance_fraction = view(step.out, out_dtype, k_out + elements, v_buffer);
    if (row.x_from_x0_prev != 0) span.x0_prev = view(*step.x0_prev, dtype, k, history_buffer);
    if (row.x_from_noise != 0) {
      if (step.noise) {
        span.noise = view(*step.noise, dtype, k, noise_buffer);
      } else {
        float drawn[kSpan];
        float* z = drawn;
        if constexpr (!kDouble) z = noise_buffer;
        kernels.normal(seeds[b], stream_step(kStreamStep, rows[b]), images[b], begin, z, n);
        if constexpr (kDouble) std::copy(drawn, drawn + n, noise_buffer);
        span.noise = noise_buffer;
      }
    }
    const bool in_place = kDouble || dtype == Dtype::kFloat;
    span.x_next = in_place ? reinterpret_cast<T*>(mutable_at(x_next, dtype, k)) : x_buffer;
    if (x0) span.x0 = in_place ? reinterpret_cast<T*>(mutable_at(*x0, dtype, k)) : history_buffer;
    if constexpr (kDouble) {
      kernels.posterior_step_double(row, span, n);
    } else {
      kernels.posterior_step_float(row, span, n);
      if (!in_place) {
        kernels.store(dtype, x_buffer, mutable_at(x_next, dtype, k), n);
        if (x0) kernels.store(dtype, history_buffer, mutable_at(*x0, dtype, k), n);
      }
    }
  });
}

void step_into(
    const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& i, const OptionalTensor& noise,
    const OptionalTensor& seed, const OptionalTensor& image_index, const OptionalTensor& x0_prev, double clip,
    const OptionalTensor& clip_each, Tensor& x_next, OptionalTensor& x0) {
  check_posterior_step(x, out, table, noise, seed, image_index, x0_prev, clip_each);
  Step step{
      as_contiguous(x),
      as_contiguous(out),
      as_contiguous(table),
      i,
      noise,
      seed,
      image_index,
      x0_prev,
      clip_each,
      clip};
  if (noise) step.noise = as_contiguous(*noise);
  if (x0_prev) step.x0_prev = as_contiguous(*x0_prev);
  if (clip_each) step.clip_each = as_contiguous(*clip_each);
  if (x.scalar_type() == ScalarType::Double) {
    run<double>(step, x_next, x0);
  } else {
    run<float>(step, x_next, x0);
  }
}

std::tuple<Tensor, Tensor> posterior_step_cpu(
    Tensor x, Tensor out, Tensor table, Tensor i, OptionalTensor noise, OptionalTensor seed,
    OptionalTensor image_index, OptionalTensor x0_prev, double clip, OptionalTensor clip_each) {
  x = as_contiguous(x);
  Tensor x_next = empty_as(x);
  OptionalTensor x0 = empty_as(x);
  step_into(x, out, table, i, noise, seed, image_index, x0_prev, clip, clip_each, x_next, x0);
  return {x_next, *x0};
}

void posterior_step_in_place_cpu(
    Tensor x, Tensor out, Tensor table, Tensor i, OptionalTensor noise, OptionalTensor seed,
    OptionalTensor image_index, OptionalTensor x0, double clip, OptionalTensor clip_each) {
  check(x.is_contiguous() && (!x0 || x0->is_contiguous()), "x and x0 must be contiguous");
  step_into(x, out, table, i, noise, seed, image_index, x0, clip, clip_each, x, x0);
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("posterior_step", TORCH_BOX(&posterior_step_cpu));
  m.impl("posterior_step_", TORCH_BOX(&posterior_step_in_place_cpu));
}

}  // namespace
}  // namespace ddpm_fast
