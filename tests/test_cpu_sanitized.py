"""The norm's, the noise's and dropout's kernels under AddressSanitizer: see `sanitized`; conv3x3's have
their own program."""

from __future__ import annotations

import pytest
from sanitized import ARRAYS, FLAGS, RUNS, run_sanitized

PROGRAM = """
#include "kernels/convert.h"
#include "kernels/dropout.h"
#include "kernels/group_norm_silu.h"
#include "kernels/noise.h"
ARRAYS
using namespace ddpm_fast;
using namespace ddpm_fast::cpu;

void must(bool good, const char* what, int64_t a, int64_t b, int64_t c) {
  if (good) return;
  std::printf("%s: %ld %ld %ld\\n", what, (long)a, (long)b, (long)c);
  std::exit(1);
}

// Channels [0, split) lie in one tensor and the others in a second; `far`: past kSiluNear's bound.
template <typename T>
void norm(Dtype dtype, int64_t pixels, int64_t channels, int64_t split, int64_t group, bool last, bool far) {
  const Array<float> values = floats(pixels * channels, 1), weight = floats(channels, 2);
  const Array<float> add = floats(channels, 3), shift = floats(channels, 4);
  if (far) shift[0] = 200, values[0] = 1e4f;
  const int64_t rest = channels - split;
  const Array<T> first(new T[split * pixels]), second(new T[rest * pixels]);
  const Array<T> y(new T[channels * pixels]), both(new T[channels * pixels]);
  const auto at = [&](int64_t c, int64_t p) { return last ? p * channels + c : c * pixels + p; };
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t of = c < split ? split : rest, k = c < split ? c : c - split;
      T* const to = (c < split ? first.get() : second.get()) + (last ? p * of + k : k * pixels + p);
      store_any(dtype, &values[at(c, p)], to, 1);
      load_any(dtype, to, &values[at(c, p)], 1);
    }
  }
  GroupNormSources sources = {{{first.get(), split, split}, {}}};
  if (rest > 0) sources.of[1] = {second.get(), rest, rest};
  const GroupNormArgs args = {weight.get(), nullptr, add.get(), nullptr, shift.get(), 1e-5, true};
  if (last) {
    const Array<double> scratch(new double[group_norm_scratch(channels) / 2]);
    group_norm_nhwc<T>(
        sources, y.get(), both.get(), pixels, channels, channels, group, args,
        reinterpret_cast<float*>(scratch.get()));
  } else {
    group_norm_nchw<T>(sources, y.get(), both.get(), pixels, group, channels / group, args);
  }
  for (int64_t begin = 0; begin < channels; begin += group) {
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < group * pixels; ++k) {
      const double v = double(values[at(begin + k % group, k / group)]) + add[begin + k % group];
      sum += v, squares += v * v;
    }
    const double mean = sum / (group * pixels), variance = squares / (group * pixels) - mean * mean;
    for (int64_t k = 0; k < group * pixels; ++k) {
      const int64_t c = begin + k % group, p = k / group;
      const double u = (values[at(c, p)] + add[c] - mean) / std::sqrt(variance + 1e-5) * weight[c] + shift[c];
      const double exact = u / (1 + std::exp(-u)), unit = dtype == Dtype::kFloat ? 1e-5 : 1e-2;
      float got, copied;
      load_any(dtype, &y[at(c, p)], &got, 1), load_any(dtype, &both[at(c, p)], &copied, 1);
      must(std::abs(got - exact) <= unit * (1 + std::abs(exact)), "norm", pixels, channels, split);
      must(copied == values[at(c, p)], "concat", pixels, channels, split);
    }
  }
}

template <typename T>
void norms(Dtype dtype) {
  const int64_t shapes[][3] = {{6, 6, 3}, {34, 34, 17}, {70, 33, 5}, {64, 32, 16}, {160, 160, 40}};
  for (const int64_t pixels : {1, 4, 16, 35, 130}) {
    for (const auto& s : shapes) {
      for (int k = 0; k < 4; ++k) norm<T>(dtype, pixels, s[0], s[1], s[2] == 5 ? 7 : s[2], k & 1, k & 2);
    }
  }
}

void noises() {
  for (const int64_t n : {1, 3, 4, 7, 127, 128, 131, 1000}) {
    const Array<float> whole(new float[n]);
    normal(7, 5, 3, 0, whole.get(), n);
    for (const int64_t images : {1, 2, 37}) {
      const Array<int64_t> index(new int64_t[images]);
      for (int64_t k = 0; k < images; ++k) index[k] = k == images / 2 ? 3 : (k << 33) - 1;
      const Array<float> each(new float[images * n]);
      normal_each(7, 5, index.get(), images, n, each.get());
      const int64_t at = images / 2 * n;
      must(std::memcmp(&each[at], &whole[0], n * sizeof(float)) == 0, "noise", n, images, 0);
    }
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf}) {
      const int64_t size = dtype == Dtype::kFloat ? 4 : 2;
      const Array<char> x(new char[n * size]), y(new char[n * size]);
      const Array<float> ones(new float[n]);
      for (int64_t k = 0; k < n; ++k) ones[k] = 1;
      store_any(dtype, ones.get(), x.get(), n);
      dropout(dtype, 7, 1 << 15, 1024, x.get(), y.get(), n);
      load_any(dtype, y.get(), ones.get(), n);
      for (int64_t k = 0; k < n; ++k) must(ones[k] == 0 || ones[k] == 2, "dropout", n, size, k);
    }
  }
}

int main() {
RUNS
  norms<float>(Dtype::kFloat);
  norms<BFloat16>(Dtype::kBFloat16);
  noises();
}
""".replace("ARRAYS", ARRAYS).replace("RUNS", RUNS)


@pytest.mark.parametrize("isa", [isa for isa in FLAGS if isa != "amx"])  # whose norm is AVX-512's
def test_under_address_sanitizer(isa, tmp_path):
    run_sanitized(PROGRAM, isa, tmp_path, "-O0")  # a quarter of the time
