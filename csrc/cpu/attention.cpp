// attention on the CPU: checks, threads and the workspace around kernels/attention.h.
#include "../common.h"
#include "kernels.h"
#include "program.h"
#include "team.h"
#include "workspace.h"

namespace ddpm_fast {
namespace {

using cpu::AttentionHead;
using cpu::AttentionKernels;
using cpu::AttentionPlan;

constexpr int64_t kWorthAThread = int64_t{1} << 19;  // products: some 10 us

// With heads for every thread, a thread takes whole ones: nothing waits, and nothing is read from another's
// cache. With fewer, all threads lay out keys and values, and then take blocks of queries, unless one thread
// has done it all by then.
template <typename HeadAt>
void run(const AttentionKernels& kernels, const AttentionPlan& plan, int64_t heads, const HeadAt& head_at) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t products = 2 * plan.tokens * plan.tokens * plan.width;  // of a head
  if (heads % threads == 0 || heads >= 4 * threads || heads * products < 2 * kWorthAThread) {
    const int64_t grain = (kWorthAThread + products - 1) / products;
    parallel_for(0, heads, grain, [&](int64_t first, int64_t last) {
      float* const laid_out = for_operands().floats(plan.laid_out);
      float* const scratch = for_scratch().floats(plan.scratch);
      for (int64_t head = first; head < last; ++head) {
        kernels.lay_out(plan, head_at(head), 0, plan.pieces, laid_out, scratch);
        kernels.attend(plan, head_at(head), laid_out, 0, plan.blocks, scratch);
      }
    });
    return;
  }
  float* const laid_out = for_operands().floats(heads * plan.laid_out);
  const auto each = [&](int64_t parts, const auto& work) {
    parallel_for(0, heads * parts, 1, [&](int64_t first, int64_t last) {
      float* const scratch = for_scratch().floats(plan.scratch);
      for (int64_t head = first / parts; head * parts < last; ++head) {
        const int64_t begin = head * parts;
        work(
            head_at(head), first > begin ? first - begin : 0, last - begin < parts ? last - begin : parts,
            laid_out + head * plan.laid_out, scratch);
      }
    });
  };
  each(plan.pieces, [&](const AttentionHead& head, int64_t first, int64_t last, float* to, float* scratch) {
    kernels.lay_out(plan, head, first, last, to, scratch);
  });
  each(plan.blocks, [&](const AttentionHead& head, int64_t first, int64_t last, float* from, float* scratch) {
    kernels.attend(plan, head, from, first, last, scratch);
  });
}

void attention_into(Tensor qkv, int64_t heads, Tensor y) {
  const Dtype dtype = dtype_of("qkv", qkv);
  check(dtype == Dtype::kFloat || dtype == Dtype::kBFloat16, "qkv must be float32 or bfloat16");
  qkv = as_contiguous(qkv);
  const int64_t images = qkv.size(0), tokens = qkv.size(1), channels = qkv.size(2) / 3;
  if (y.numel() == 0) return;
  const AttentionKernels& kernels =
      dtype == Dtype::kFloat ? cpu::kernels().attention_float : cpu::kernels().attention_bfloat16;
  const AttentionPlan plan =
      kernels.plan(tokens, channels / heads, static_cast<int64_t>(torch::stable::get_num_threads()));
  run(kernels, plan, images * heads, [&](int64_t head) {
    const int64_t image = head / heads, channel = head % heads * plan.width;
    const auto of = [&](int64_t which) {
      return at(qkv, dtype, (image * tokens * 3 + which) * channels + channel);
    };
    char* const to = mutable_at(y, dtype, image * tokens * channels + channel);
    return AttentionHead{of(0), of(1), of(2), 3 * channels, to, channels};
  });
}

Tensor attention_cpu(Tensor qkv, int64_t heads) {
  check(
      qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0,
      "qkv must be (B, N, 3 C), C a multiple of heads");
  const Tensor y = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2) / 3});
  attention_into(qkv, heads, y);
  return y;
}

const bool in_programs = runs_in_programs<attention_into>("attention");

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) { m.impl("attention", TORCH_BOX(&attention_cpu)); }

}  // namespace
}  // namespace ddpm_fast
