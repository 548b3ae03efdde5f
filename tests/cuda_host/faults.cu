// Kernels that are right until told to be wrong: what the sanitizers and the runtime must catch.
//
//   faults FAULT ORDER   prints the numbers that the kernel of that fault leaves; FAULT may be `none`
#include <array>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "device.cuh"

namespace {

using ddpm_fast::cuda::dynamic_shared;
using ddpm_fast::cuda::launch;

enum class Fault {
  kNone,
  kGlobal,      // a write one element past y
  kShared,      // a write one element past the dynamic shared memory
  kMisaligned,  // an access of 16 bytes where an element is aligned
  kBarrier,     // no barrier between write and read
  kDivergent,   // a barrier that some threads wait at while others wait for them elsewhere
  kCaller,      // a mask without the caller
  kMask,        // lanes of one shuffle with two masks
  kOperation,   // lanes of one shuffle in two operations
  kSource,      // a read from a lane that is not in the mask
  kReturned,    // a read from a lane that has returned
};

const std::map<std::string, Fault> kFaults = {
    {"none", Fault::kNone},           {"global", Fault::kGlobal},
    {"shared", Fault::kShared},       {"misaligned", Fault::kMisaligned},
    {"barrier", Fault::kBarrier},     {"divergent", Fault::kDivergent},
    {"caller", Fault::kCaller},       {"mask", Fault::kMask},
    {"operation", Fault::kOperation}, {"source", Fault::kSource},
    {"returned", Fault::kReturned},
};

// y = x
__global__ void copy(const float* x, float* y, int n, Fault fault) {
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int from = 4 * k + (fault == Fault::kMisaligned);
  if (from + 4 <= n) *reinterpret_cast<float4*>(y + from) = *reinterpret_cast<const float4*>(x + from);
  for (int j = n / 4 * 4 + k; j < n + (fault == Fault::kGlobal);
       j += static_cast<int>(gridDim.x * blockDim.x)) {
    y[j] = x[j - (j == n)];
  }
}

// y = x backwards, a block at a time
__global__ void reverse(const float* x, float* y, Fault fault) {
  float* all = dynamic_shared<float>();
  const int n = static_cast<int>(blockDim.x), k = static_cast<int>(threadIdx.x);
  all[k + (fault == Fault::kShared && k == n - 1)] = x[static_cast<int>(blockIdx.x) * n + k];
  if (fault != Fault::kBarrier && (fault != Fault::kDivergent || k < n - 1)) __syncthreads();
  if (fault == Fault::kDivergent && k == n - 1) __syncwarp();
  y[static_cast<int>(blockIdx.x) * n + k] = all[n - 1 - k];
}

// y = sums over pairs of lanes
__global__ void pairs(const float* x, float* y, Fault fault) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned mask = ~0u;
  if (fault == Fault::kCaller && lane == 5) mask = 0xffff0000u;
  if (fault == Fault::kMask && lane >= 16) mask = 0xfffffffeu;
  if (fault == Fault::kSource) mask = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  if (fault == Fault::kReturned && lane == 7) return;
  const float mine = x[lane];
  const float other = fault == Fault::kOperation && lane == 9 ? __shfl_sync(mask, mine, lane ^ 1)
                                                              : __shfl_xor_sync(mask, mine, 1);
  y[lane] = mine + other;
}

// Every word of a warp and of a block, in a warp that is whole and in one of eight lanes.
__global__ void vocabulary() {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warpSize, first = lane & ~7;
  const unsigned mask = thread < warpSize ? ~0u : 0xffu;
  bool right = __shfl_sync(mask, lane, 3) == 3 && __shfl_sync(mask, 0.5 * lane, 11, 8) == 0.5 * (first + 3);
  right &= __shfl_xor_sync(mask, lane, 5) == (lane ^ 5);
  right &= __shfl_xor_sync(mask, lane, 8, 8) == ((lane & 8) != 0 ? lane - 8 : lane);
  right &= __shfl_up_sync(mask, lane, 3, 8) == (lane - 3 >= first ? lane - 3 : lane);
  right &= __shfl_down_sync(mask, lane, 3, 8) == (lane + 3 < first + 8 ? lane + 3 : lane);
  right &= __ballot_sync(mask, lane % 2) == (mask & 0xaaaaaaaau);
  right &= __any_sync(mask, lane == 7) && !__any_sync(mask, lane == 32);
  right &= __all_sync(mask, lane < 32) && !__all_sync(mask, lane != 7);
  right &= __syncthreads_count(lane < 4) == 8;
  right &= __syncthreads_or(thread == 39) && !__syncthreads_or(thread == 40);
  right &= __syncthreads_and(thread < 40) && !__syncthreads_and(thread != 39);
  if (!right) __trap();
}

}  // namespace

int main(int, char** words) {
  const Fault fault = kFaults.at(words[1]);
  cuda_host::descending = words[2] == std::string("descending");
  std::vector<float> x(70), y(70);
  for (int k = 0; k < 70; ++k) x[k] = static_cast<float>(k);
  const auto show = [&] {
    for (const float value : y) std::printf("%g ", value);
    std::printf("\n");
  };
  launch(copy, 2, 9, 0, nullptr, x.data(), y.data(), 70, fault);
  show();
  launch(reverse, 2, 35, 4 * 35, nullptr, x.data(), y.data(), fault);
  show();
  launch(pairs, 1, 32, 0, nullptr, x.data(), y.data(), fault);
  show();
  launch(vocabulary, 1, 40, 0, nullptr);
  for (const auto& [grid, block, bytes] :
       std::vector<std::array<int, 3>>{{0, 32, 0}, {1, 0, 0}, {1, 1025, 0}, {1, 32, 49153}}) {
    try {
      launch(copy, grid, block, bytes, nullptr, x.data(), y.data(), 0, fault);
    } catch (const std::runtime_error& error) {
      std::printf("%s: %d\n", error.what(), cudaGetLastError());
    }
  }
  std::printf(
      "%d %d\n", cudaFuncSetAttribute(copy, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448),
      cudaFuncSetAttribute(copy, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449));
  launch(copy, 1, 32, 232448, nullptr, x.data(), y.data(), 0, fault);
}
