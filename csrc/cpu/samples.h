// A batch on the CPU: values read by sample, and samples split over threads.
#pragma once

#include <algorithm>

#include "../checks.h"

namespace ddpm_fast {

// A 0-d or (B,) int64 tensor, read by sample.
class PerSample {
 public:
  PerSample(const char* name, const Tensor& values, int64_t batch)
      : values_(checked_per_sample(name, values, batch)) {
    data_ = static_cast<const int64_t*>(values_.const_data_ptr());
    stride_ = values_.numel() == 1 ? 0 : 1;
  }

  int64_t operator[](int64_t sample) const { return data_[sample * stride_]; }

  bool is_one() const { return values_.numel() == 1; }

  const int64_t* from(int64_t sample) const { return data_ + sample * stride_; }

  void check_range(const char* name, int64_t rows) const {
    for (int64_t b = 0; b < values_.numel(); ++b) {
      if (data_[b] < 0 || data_[b] >= rows) {
        fail<std::out_of_range>(name, " must be in [0, ", rows - 1, "], got ", data_[b]);
      }
    }
  }

 private:
  Tensor values_;
  const int64_t* data_;
  int64_t stride_;
};

// f(sample, begin, end) over spans of each sample's elements; a span is at most `span` elements and starts at
// a multiple of it. Small work stays on one thread: waking another costs more.
template <typename F>
void parallel_spans(int64_t batch, int64_t elements, int64_t span, const F& f) {
  if (batch * elements == 0) return;
  const int64_t spans = (elements + span - 1) / span;
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::min(span, elements));
  torch::stable::parallel_for(0, batch * spans, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k % spans * span;
      f(k / spans, begin, std::min(begin + span, elements));
    }
  });
}

}  // namespace ddpm_fast
