// What every CUDA binding needs of torch: its device and stream, and values as the kernels take them.
//
// Nothing that lies on the device is read on the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"
#include "kernels.h"

namespace ddpm_fast {

// The device of an op's first operand, current while this lives.
class OnDevice {
 public:
  OnDevice(const char* name, const Tensor& x) : name_(name), index_(index_of(name, x)), guard_(index_) {}

  // Every other operand lies there too.
  void check_same(const char* name, const OptionalTensor& value) const {
    check(
        !value || (value->is_cuda() && value->get_device_index() == index_), name,
        " must be on the device of ", name_);
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  static int32_t index_of(const char* name, const Tensor& x) {
    check(x.is_cuda(), name, " must be on a CUDA device, as the other operands are");
    return x.get_device_index();
  }

  const char* name_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// The dtype of a tensor that a kernel computes in float32.
inline Dtype kernel_dtype(const char* name, const Tensor& x) {
  const Dtype dtype = dtype_of(name, x);
  check(dtype != Dtype::kDouble, name, " must be float32, bfloat16 or float16 on a CUDA device");
  return dtype;
}

// Values by sample: a kernel's own view of a tensor that outlives the call.
inline cuda::PerSample per_sample(const Tensor& values) {
  return {static_cast<const int64_t*>(values.const_data_ptr()), values.numel() == 1 ? 0 : 1};
}

inline const void* data_of(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

inline cuda::Layout layout_of(const Tensor& x) {
  if (!is_channels_last(x)) return {};
  return {x.size(2) * x.size(3), x.size(1)};
}

}  // namespace ddpm_fast
