// fingerprint on the CPU: threads around kernels/fingerprint.h.
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace ddpm_fast {
namespace {

int64_t fingerprint_cpu(Tensor x) {
  x = as_contiguous(x);
  const int64_t bytes = x.numel() * size_of(dtype_of("x", x)), span = int64_t{1} << 18;
  std::vector<uint64_t> parts((bytes + span - 1) / span + 1);
  const char* const data = static_cast<const char*>(x.const_data_ptr());
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()) - 1, 4, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k * span, end = begin + span < bytes ? begin + span : bytes;
      parts[k] = cpu::kernels().fingerprint(data + begin, end - begin);
    }
  });
  return static_cast<int64_t>(cpu::kernels().fingerprint(parts.data(), parts.size() * sizeof(uint64_t)));
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint_cpu)); }

}  // namespace
}  // namespace ddpm_fast
