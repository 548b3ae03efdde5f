// posterior_step and posterior_step_ on the CPU: checks, rows and threads around kernels/posterior_step.h.
#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../philox.h"
#include "kernels.h"
#include "samples.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kSpan = 1024;  // six operands of 4 KB: they meet in L1
constexpr int64_t kFew =
    128;  // elements of a sample, below which a kernel call for it costs more than they do

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

// A tensor's elements, whose address is asked for once, not span by span.
struct Elements {
  Elements(const Tensor& x, Dtype dtype) : data(static_cast<const char*>(x.const_data_ptr())), dtype(dtype) {}
  Elements(const OptionalTensor& x, Dtype dtype) : dtype(dtype) {
    if (x) data = static_cast<const char*>(x->const_data_ptr());
  }

  // Span [k, k + n) as T: where it lies if it is so already, else converted into a buffer.
  template <typename T>
  const T* span(int64_t k, int64_t n, T* buffer) const {
    const char* from = data + k * size_of(dtype);
    if constexpr (std::is_same_v<T, float>) {
      if (dtype != Dtype::kFloat) {
        cpu::kernels().load(dtype, from, buffer, n);
        return buffer;
      }
    }
    return reinterpret_cast<const T*>(from);
  }

  const char* data = nullptr;
  Dtype dtype;
};

// T is what is computed in: float, or double for a double x.
template <typename T>
void run(const Step& step, Tensor& x_next, OptionalTensor& x0) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t samples = step.x.size(0), size = step.x.numel() / std::max<int64_t>(samples, 1);
  const int64_t out_elements = step.out.numel() / std::max<int64_t>(samples, 1);
  const bool learned = step.table.size(1) == 9;
  const PerSample steps("i", step.i, samples);
  steps.check_range("i", step.table.size(0));
  const PerSample seeds = step.seed ? PerSample("seed", *step.seed, samples) : steps;
  const PerSample images = step.image_index ? PerSample("image_index", *step.image_index, samples) : steps;
  // Small samples that differ by their noise only go through the kernels as one.
  const bool together = samples > 1 && size > 0 && size < kFew && steps.is_one() && !step.clip_each &&
                        out_elements == size && !learned &&
                        (!step.seed || (seeds.is_one() && !images.is_one()));
  const int64_t batch = together ? 1 : samples, elements = together ? samples * size : size;
  std::vector<cpu::StepRow> rows(batch);
  for (int64_t b = 0; b < batch; ++b) {
    rows[b] = row_of(step, steps[b], b);
    check(rows[b].x_from_x0_prev == 0 || step.x0_prev, "x0_prev is missing, and row i of the table needs it");
    check(
        rows[b].x_from_noise == 0 || step.noise || step.seed,
        "noise or seed is missing, and row i of the table needs it");
  }
  const Dtype dtype = dtype_of("x", step.x);
  const Elements x(step.x, dtype), out(step.out, dtype_of("out", step.out));
  const Elements noise(step.noise, dtype), history(step.x0_prev, dtype);
  char* const next = mutable_at(x_next, dtype, 0);
  char* const clean = x0 ? mutable_at(*x0, dtype, 0) : nullptr;

  const int64_t longest = together ? kSpan / size * size : kSpan;
  parallel_spans(batch, elements, longest, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t n = end - begin, k = b * elements + begin, k_out = b * out_elements + begin;
    const cpu::StepRow& row = rows[b];
    T x_buffer[kSpan], out_buffer[kSpan], v_buffer[kSpan], history_buffer[kSpan], noise_buffer[kSpan];
    cpu::StepSpan<T> span = {};
    span.x = x.span(k, n, x_buffer);
    span.out = out.span(k_out, n, out_buffer);
    if (learned) span.log_variance_fraction = out.span(k_out + elements, n, v_buffer);
    if (row.x_from_x0_prev != 0) span.x0_prev = history.span(k, n, history_buffer);
    if (row.x_from_noise != 0) {
      if (step.noise) {
        span.noise = noise.span(k, n, noise_buffer);
      } else {
        constexpr bool kDouble = std::is_same_v<T, double>;
        float drawn[kDouble ? kSpan : 1];
        float* const z = kDouble ? drawn : reinterpret_cast<float*>(noise_buffer);
        const uint32_t stream = stream_step(kStreamStep, steps[b]);
        if (together) {
          kernels.normal_each(seeds[b], stream, images.from(begin / size), n / size, size, z);
        } else {
          kernels.normal(seeds[b], stream, images[b], begin, z, n);
        }
        if (kDouble) std::copy(z, z + n, noise_buffer);
        span.noise = noise_buffer;
      }
    }
    const int64_t at = k * size_of(dtype);
    const bool in_place = sizeof(T) == static_cast<size_t>(size_of(dtype));
    span.x_next = in_place ? reinterpret_cast<T*>(next + at) : x_buffer;
    if (clean != nullptr) span.x0 = in_place ? reinterpret_cast<T*>(clean + at) : history_buffer;
    if constexpr (std::is_same_v<T, double>) {
      kernels.posterior_step_double(row, span, n);
    } else {
      kernels.posterior_step_float(row, span, n);
      if (!in_place) {
        kernels.store(dtype, x_buffer, next + at, n);
        if (clean != nullptr) kernels.store(dtype, history_buffer, clean + at, n);
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
