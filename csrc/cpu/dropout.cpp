// dropout on the CPU: checks, layouts and threads around kernels/dropout.h.
#include "../common.h"
#include "../layout.h"
#include "kernels.h"
#include "samples.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kSpan = 4096;

Tensor dropout_cpu(Tensor x, Tensor seed, int64_t threshold) {
  const Dtype dtype = dtype_of("x", x);
  check(dtype != Dtype::kDouble, "x must be float32, bfloat16 or float16");
  check(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  check(threshold >= 0 && threshold < 65536, "threshold must be in [0, 65535], got ", threshold);
  x = keep_layout(x);
  const Tensor y = empty_as(x);
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  parallel_spans(1, x.numel(), kSpan, [&](int64_t, int64_t begin, int64_t end) {
    cpu::kernels().dropout(
        dtype, key, threshold, begin, at(x, dtype, begin), mutable_at(y, dtype, begin), end - begin);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout_cpu));
  m.impl("dropout_forward", TORCH_BOX(&dropout_cpu));
}

}  // namespace
}  // namespace ddpm_fast
