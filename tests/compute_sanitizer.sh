#!/usr/bin/env bash
# The native CUDA kernels under compute-sanitizer, where there is a GPU: accesses, races, uninitialised reads and
# barriers. Without torch's caching allocator, so that what lies beyond a tensor is nobody's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  echo "+ $tool"
  compute-sanitizer --tool "$tool" --kernel-name kernel_substring=ddpm_fast --error-exitcode 1 \
    python -m pytest -q -m gpu -k native tests/test_cuda.py tests/test_cuda_pointwise.py "$@"
done
