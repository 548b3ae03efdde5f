"""What the compilers make of the Triton kernels, for four architectures and with no GPU:

    python -m benchmarks.codegen [--arch 80 90 100 120] [--only NAME] [--json FILE] [--write-budget]

Each case calls a launcher with aligned tensors, as a sampler does; the launch is compiled, with the
specialisation that it would have on a GPU, and not run. A row tells registers a thread, bytes spilled (stack
and local memory), shared memory, barriers, and the share of global bytes moved by accesses of 128 bits or
more (from the PTX: an access whose address depends on the thread counts once a thread, a uniform one once).
`tests/codegen_budget.json` holds what was committed, and `tests/test_codegen.py` fails where a figure rises.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from ddpm_fast.ops._triton import (
    counter_normal,
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_concat,
    posterior_step,
    q_sample,
)

from .figures import ARCHITECTURES, BUDGET, Figures, Rows, as_json, show, wide_share, write, write_budget

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], object]
    """Calls a launcher on CPU tensors; every kernel that it launches is compiled instead."""
    wide: float = 0.9
    """The least share of bytes in 128-bit accesses; lower only where a layout forbids them. Kernels that read
    sums, and no pixels, have none."""


# ---- the cases: CIFAR-10 images, as a run has them ----

B = 8


def image(dtype: torch.dtype, channels: int = 3, layout=torch.contiguous_format) -> Tensor:
    return torch.zeros(B, channels, 32, 32, dtype=dtype).contiguous(memory_format=layout)


ROWS, LEARNED_ROWS, WEIGHTS = torch.zeros(50, 7), torch.zeros(50, 9), torch.zeros(1000, 2)
STEP, TIMES = torch.tensor(3), torch.arange(B)
COUNTER = torch.tensor(5), torch.arange(B)  # seed, image index


def q_sample_case(dtype: torch.dtype) -> Callable:
    return lambda: q_sample.q_sample(image(dtype), image(dtype), TIMES, WEIGHTS)


def q_sample_counter_case(dtype: torch.dtype, layout=torch.contiguous_format) -> Callable:
    return lambda: q_sample.q_sample_counter(image(dtype, 3, layout), TIMES, WEIGHTS, *COUNTER)


def step_given_case(dtype: torch.dtype) -> Callable:
    x = image(dtype)
    return lambda: posterior_step.posterior_step(x, x, ROWS, STEP, x, None, None, x, 1.0, None)


def step_drawn_case(dtype: torch.dtype, out: Tensor, table: Tensor = ROWS) -> Callable:
    x = image(dtype)
    return lambda: posterior_step.posterior_step_(x, out, table, STEP, None, *COUNTER, None, 1.0, None)


CASES = [
    Case("counter_normal", lambda: counter_normal.counter_normal((B, 3, 32, 32), *COUNTER, STEP, 1)),
    Case("q_sample float32", q_sample_case(FLOAT)),
    Case("q_sample bfloat16", q_sample_case(BF16)),
    Case("q_sample float16", q_sample_case(HALF)),
    Case("q_sample_counter float32", q_sample_counter_case(FLOAT)),
    Case("q_sample_counter bfloat16", q_sample_counter_case(BF16)),
    Case("q_sample_counter float16", q_sample_counter_case(HALF)),
    Case("q_sample_counter bfloat16 NHWC", q_sample_counter_case(BF16, torch.channels_last), wide=0),
    Case("posterior_step given float32", step_given_case(FLOAT)),
    Case("posterior_step given bfloat16", step_given_case(BF16)),
    Case("posterior_step given float16", step_given_case(HALF)),
    Case("posterior_step drawn float32", step_drawn_case(FLOAT, image(FLOAT))),
    Case("posterior_step drawn bfloat16", step_drawn_case(BF16, image(BF16))),
    Case("posterior_step drawn float32, bfloat16 out", step_drawn_case(FLOAT, image(BF16))),
    Case(
        "posterior_step drawn float32, bfloat16 NHWC out",
        step_drawn_case(FLOAT, image(BF16, 3, torch.channels_last)),
        wide=0.75,
    ),
    Case(
        "posterior_step learned float32, bfloat16 out", step_drawn_case(FLOAT, image(BF16, 6), LEARNED_ROWS)
    ),
]


# ---- the U-Net's norms, at a batch that fills a device ----


def norm_case(
    dtype: torch.dtype, last: bool, channels: int, side: int, backward: bool, film: bool
) -> Callable:
    def launch():
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.zeros(64, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
        vector, row = torch.zeros(channels, dtype=dtype), torch.zeros(64, channels, dtype=dtype)
        factor = row if film else None
        rest = (x, 32, vector, vector, 1e-5, row, factor, factor, True)
        if backward:
            return group_norm_silu_backward.group_norm_silu_backward(x, *rest)
        return group_norm_silu.group_norm_silu(*rest)

    return launch


def concat_case(last: bool, channels: tuple[int, int], side: int, concat: bool) -> Callable:
    def launch():
        layout = torch.channels_last if last else torch.contiguous_format
        x, skip = (
            torch.zeros(64, c, side, side, dtype=BF16).contiguous(memory_format=layout) for c in channels
        )
        vector = torch.zeros(sum(channels), dtype=BF16)
        rest = (32, vector, vector, 1e-5, None, None, None, True)  # what a residual block's first norm has
        return group_norm_silu_concat.group_norm_silu_concat(x, skip, *rest, concat)

    return launch


# Lower where operands weigh: 16 pixels a channel, or a half's own read anew by each thread of a long row.
CASES += [
    Case(
        f"group_norm_silu{'_backward' * backward} {channels} x {side} x {side} "
        f"{str(dtype).removeprefix('torch.')} {'NHWC' if last else 'NCHW'}{' FiLM' * (side == 32)}",
        norm_case(dtype, last, channels, side, backward, film=side == 32),
        wide=0.8 if (side == 4 and backward) or (side == 16 and dtype == BF16 and not last) else 0.9,
    )
    for backward in (False, True)
    for channels, side in ((128, 32), (256, 16), (512, 4))
    for dtype in (FLOAT, BF16)
    for last in (False, True)
]

# The largest tiles: two groups of 12 channels in one that is a quarter empty, and 64 x 64 pixels; and, at
# 128 x 128, what is split.
CASES += [
    Case("group_norm_silu 384 x 32 x 32 bfloat16 NHWC", norm_case(BF16, True, 384, 32, False, film=False))
]
CASES += [
    Case(
        f"group_norm_silu{'_backward' * backward} 128 x {side} x {side} "
        f"{str(dtype).removeprefix('torch.')} {'NHWC' if last else 'NCHW'}",
        norm_case(dtype, last, 128, side, backward, film=False),
        wide=0.9 if dtype == FLOAT else 0.8,  # sums are float32
    )
    for backward in (False, True)
    for side in (64, 128)
    for dtype in (FLOAT, BF16)
    for last in (False, True)
]
CASES += [
    Case(
        f"group_norm_silu_concat {channels[0]}+{channels[1]} x {side} x {side} bfloat16 "
        f"{'NHWC' if last else 'NCHW'}{' built' * concat}",
        concat_case(last, channels, side, concat),
    )
    for channels, side in (((256, 128), 32), ((256, 256), 16), ((128, 128), 128))
    for last in (False, True)
    for concat in (False, True)
]


# ---- compiling ----


class Compiler(DriverBase):
    """Stands for a GPU of compute capability `arch` where Triton asks what it compiles for."""

    def __init__(self, arch: int):
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:  # Triton keeps the compiled kernels of a device apart
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError


def compiled(case: Case, arch: int) -> dict[str, Figures]:
    """The figures of the kernels that a case launches, by row name."""
    kernels = []
    run = JITFunction.run

    def warm(self, *args, grid, warmup, **kwargs):
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Compiler(arch))
    JITFunction.run = warm
    try:
        case.launch()
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active
    several = len({name for name, _ in kernels}) > 1
    return {f"{case.name} {name}" if several else case.name: figures(kernel) for name, kernel in kernels}


def figures(kernel) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    ptx = kernel.asm["ptx"]
    return Figures(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        barriers=len(re.findall(r"\b(?:bar|barrier)\.(?:cta\.)?sync", ptx)),
        wide=round(wide_share(ptx, 32 * kernel.metadata.num_warps), 3),
    )


def floors(names: Iterable[str]) -> dict[str, float]:
    """Row name -> the least `wide`, where it is not the usual one."""
    by_case = {case.name: case.wide for case in CASES}
    found = {}
    for name in names:
        case, _, kernel = name.rpartition(" ")
        reads_sums = kernel in ("finish_kernel", "spread_kernel")
        found[name] = 0.0 if reads_sums else by_case[name if name in by_case else case]
    return {name: wide for name, wide in found.items() if wide != Case.wide}


def report(architectures=ARCHITECTURES, only: str = "") -> Rows:
    rows: Rows = {}
    chosen = [case for case in CASES if only in case.name]
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        for case in tqdm(chosen, desc="compile", disable=None):
            for arch in architectures:
                for name, row in compiled(case, arch).items():
                    rows.setdefault(name, {})[str(arch)] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-budget", action="store_true", help=f"replace {BUDGET.name}")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    rows = report(options.arch, options.only)
    show(rows)
    found = {
        "triton": triton.__version__,
        "wide": floors(rows),
        "kernels": as_json(rows),
    }
    if options.json:
        write(found, options.json)
    if options.write_budget:
        write_budget(found)


if __name__ == "__main__":
    main()
