// The element types that kernels know, on any device.
#pragma once

namespace ddpm_fast {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

}  // namespace ddpm_fast
