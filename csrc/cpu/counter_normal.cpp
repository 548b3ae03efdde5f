// counter_normal and philox4x32_10 on the CPU: checks and threads around kernels/noise.h.
#include <vector>

#include "../checks.h"
#include "../philox.h"
#include "kernels.h"
#include "samples.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kSpan = 4096;

Tensor counter_normal_cpu(
    std::vector<int64_t> shape, Tensor seed, Tensor image_index, Tensor step, int64_t stream) {
  check(!shape.empty(), "shape must have a batch dimension");
  const int64_t batch = shape[0];
  const PerSample seeds("seed", seed, batch), images("image_index", image_index, batch),
      steps("step", step, batch);
  Tensor out = torch::stable::new_empty(image_index, shape, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t elements = batch == 0 ? 0 : out.numel() / batch;
  parallel_spans(batch, elements, kSpan, [&](int64_t b, int64_t begin, int64_t end) {
    cpu::kernels().normal(
        seeds[b], stream_step(stream, steps[b]), images[b], begin, data + b * elements + begin, end - begin);
  });
  return out;
}

Tensor philox4x32_10_cpu(Tensor counter, Tensor key) {
  check_philox4x32_10(counter, key);
  counter = as_contiguous(counter);
  key = as_contiguous(key);
  Tensor out = empty_as(counter);
  const auto* c = static_cast<const int64_t*>(counter.const_data_ptr());
  const auto* k = static_cast<const int64_t*>(key.const_data_ptr());
  auto* r = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t n = 0; n < counter.size(0); ++n, c += 4, k += 2, r += 4) {
    uint32_t words[4];
    for (int j = 0; j < 4; ++j) words[j] = static_cast<uint32_t>(c[j]);
    philox4x32_10(words, static_cast<uint32_t>(k[0]), static_cast<uint32_t>(k[1]));
    for (int j = 0; j < 4; ++j) r[j] = words[j];
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("counter_normal", TORCH_BOX(&counter_normal_cpu));
  m.impl("philox4x32_10", TORCH_BOX(&philox4x32_10_cpu));
}

}  // namespace
}  // namespace ddpm_fast
