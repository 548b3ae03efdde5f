// The table of CPU kernels for one instruction set: DDPM_FAST_ISA, which CMake sets with the matching flags.
#include "kernels.h"

#include <type_traits>

#include "kernels/attention.h"
#if defined(__AMX_INT8__)
#include "kernels/attention_amx.h"
#include "kernels/conv3x3_amx.h"
#include "kernels/conv3x3_amx_direct.h"
#else
#include "kernels/conv3x3.h"
#endif
#include "kernels/conv3x3_gradient.h"
#include "kernels/convert.h"
#include "kernels/dropout.h"
#include "kernels/fingerprint.h"
#include "kernels/group_norm_silu.h"
#include "kernels/group_norm_silu_backward.h"
#include "kernels/noise.h"
#include "kernels/posterior_step.h"
#include "kernels/q_sample.h"

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

namespace ddpm_fast::cpu {
namespace {

void group_norm_nhwc_any(
    Dtype dtype, const GroupNormSources& sources, void* y, void* concat, int64_t pixels, int64_t stride,
    int64_t channels, int64_t channels_per_group, const GroupNormArgs& args, float* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    group_norm_nhwc(
        sources, static_cast<T*>(y), static_cast<T*>(concat), pixels, stride, channels, channels_per_group,
        args, scratch);
  };
  if (dtype == Dtype::kFloat) run(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (dtype == Dtype::kHalf) run(static_cast<Half*>(nullptr));
}

void group_norm_nchw_any(
    Dtype dtype, const GroupNormSources& sources, void* y, void* concat, int64_t pixels,
    int64_t channels_per_group, int64_t groups, const GroupNormArgs& args) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    group_norm_nchw(
        sources, static_cast<T*>(y), static_cast<T*>(concat), pixels, channels_per_group, groups, args);
  };
  if (dtype == Dtype::kFloat) run(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (dtype == Dtype::kHalf) run(static_cast<Half*>(nullptr));
}

void group_norm_fold_any(
    Dtype dtype, const GroupNormSources& sources, float* to, int64_t step, int64_t pixels, int64_t channels,
    int64_t channels_per_group, const GroupNormArgs& args, float* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    group_norm_fold<T>(sources, to, step, pixels, channels, channels_per_group, args, scratch);
  };
  if (dtype == Dtype::kFloat) run(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (dtype == Dtype::kHalf) run(static_cast<Half*>(nullptr));
}

void group_norm_backward_nhwc_any(
    Dtype dtype, const void* grad, const void* x, void* grad_x, int64_t pixels, int64_t stride,
    int64_t channels, int64_t channels_per_group, const GroupNormArgs& args,
    const GroupNormGradients& gradients, float* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    group_norm_backward_nhwc(
        static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), pixels, stride,
        channels, channels_per_group, args, gradients, scratch);
  };
  if (dtype == Dtype::kFloat) run(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (dtype == Dtype::kHalf) run(static_cast<Half*>(nullptr));
}

void group_norm_backward_nchw_any(
    Dtype dtype, const void* grad, const void* x, void* grad_x, int64_t pixels, int64_t channels_per_group,
    int64_t groups, const GroupNormArgs& args, const GroupNormGradients& gradients, float* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    group_norm_backward_nchw(
        static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), pixels,
        channels_per_group, groups, args, gradients, scratch);
  };
  if (dtype == Dtype::kFloat) run(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) run(static_cast<BFloat16*>(nullptr));
  if (dtype == Dtype::kHalf) run(static_cast<Half*>(nullptr));
}

#if defined(__AMX_INT8__)
template <int kDown, int kAcross, int kTaps = 3, Resize kResize = Resize::kNone>
using Conv3x3ByIsa = Conv3x3Amx<kDown, kAcross, kTaps, kResize>;
template <int kTaps>
using DirectBFloat16 = Conv3x3AmxDirect<kTaps>;
using AttentionFloat = AttentionDigits;
using AttentionBFloat16 = Attention<BFloat16Products>;
#else
template <int kDown, int kAcross, int kTaps = 3, Resize kResize = Resize::kNone>
using Conv3x3ByIsa = Conv3x3<kDown, kAcross, kTaps, kResize>;
template <int kTaps>
using DirectBFloat16 = Conv3x3<1, 1, kTaps, Resize::kNone, BFloat16>;
using AttentionFloat = Attention<FloatProducts<float> >;
using AttentionBFloat16 = Attention<FloatProducts<BFloat16> >;
#endif
template <int kDown, int kAcross, Resize kResize = Resize::kNone>
using WinogradBFloat16 = Conv3x3<kDown, kAcross, 3, kResize, BFloat16>;

}  // namespace

extern const Kernels DDPM_FAST_ISA;
const Kernels DDPM_FAST_ISA = {
    STRINGIFY(DDPM_FAST_ISA),
    load_any,
    store_any,
    axpby<float>,
    axpby<double>,
    normal,
    normal_each,
    dropout,
    posterior_step<float>,
    posterior_step<double>,
    group_norm_nhwc_any,
    group_norm_nchw_any,
    group_norm_fold_any,
    group_norm_backward_nhwc_any,
    group_norm_backward_nchw_any,
    {Conv3x3ByIsa<1, 1>::kKernels, Conv3x3ByIsa<2, 2>::kKernels, Conv3x3ByIsa<4, 2>::kKernels,
     Conv3x3ByIsa<4, 4>::kKernels, Conv3x3ByIsa<1, 1, 1>::kKernels,
     Conv3x3ByIsa<2, 2, 3, Resize::kUp>::kKernels, Conv3x3ByIsa<1, 1, 3, Resize::kDown>::kKernels,
     Conv3x3ByIsa<2, 2, 3, Resize::kDown>::kKernels},
    {DirectBFloat16<3>::kKernels, WinogradBFloat16<2, 2>::kKernels, WinogradBFloat16<4, 2>::kKernels,
     WinogradBFloat16<4, 4>::kKernels, DirectBFloat16<1>::kKernels,
     WinogradBFloat16<2, 2, Resize::kUp>::kKernels, WinogradBFloat16<1, 1, Resize::kDown>::kKernels,
     WinogradBFloat16<2, 2, Resize::kDown>::kKernels},
    Conv3x3Gradient::kKernels,
    AttentionFloat::kKernels,
    AttentionBFloat16::kKernels,
    fingerprint,
};

}  // namespace ddpm_fast::cpu
