"""The 3x3 convolutions of google/ddpm-cifar10-32's U-Net: our kernels beside oneDNN's, prepacked.

    python benchmarks/bench_conv3x3.py [--batch 1 8] [--rounds 10] [--dtype float32 | bfloat16]

Every arm runs the network's layers in order, each with its own weights, so that they come from beyond the
caches as they do in a step; arms are interleaved round by round. oneDNN enlarges the image in a pass of its
own; a layer that resizes is in an arm whose algorithm does not by f2. Ratios are of medians; GFLOP/s count
the direct convolution's multiplications and additions; errors are relative to float64, in the 2-norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_fast import UNet, UNetConfig, ops
from ddpm_fast.convolution import Conv2d, fastest_bfloat16, fastest_conv3x3, fastest_resizing
from ddpm_fast.ops._dispatch import cpu_kernels
from ddpm_fast.ops.conv3x3 import ALGORITHMS, RESIZES

CONFIG = UNetConfig(
    block_out_channels=(128, 256, 256, 256),
    down_attention=(False, True, False, False),
    up_attention=(False, False, True, False),
)
SIDE = 32


class Layer(NamedTuple):
    channels: int
    out_channels: int
    side: int  # of x
    resize: str | None

    @property
    def out_side(self) -> int:
        return {None: self.side, "up": 2 * self.side, "down": self.side // 2}[self.resize]

    def flops(self, batch: int) -> int:
        return 18 * batch * self.channels * self.out_channels * self.out_side**2

    def fastest(self, batch: int, dtype: torch.dtype) -> str:
        size = batch, self.channels, self.side, self.side
        if dtype == torch.bfloat16:
            return (None if self.resize else fastest_bfloat16(*size)) or "oneDNN"
        return (fastest_resizing(self.resize, *size) if self.resize else fastest_conv3x3(*size)) or "oneDNN"


def layers() -> list[Layer]:
    """In the order in which the network calls them."""
    found: list[Layer] = []

    def note(conv: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        side = inputs[0].shape[-1]
        resize = {side: None, 2 * side: "up", side // 2: "down"}[y.shape[-1]]
        if conv.kernel_size == (3, 3):
            found.append(Layer(conv.in_channels, conv.out_channels, side, resize))

    with torch.device("meta"), torch.no_grad():
        model = UNet(CONFIG)
        for part in model.modules():
            if isinstance(part, Conv2d):
                part.register_forward_hook(note)
        model(torch.empty(1, 3, SIDE, SIDE), torch.zeros(()))
    return found


def calls(batch: int, layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """The layer by each arm, on weights of its own, and the float64 answer."""
    x = torch.randn(batch, layer.channels, layer.side, layer.side).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(layer.out_channels, layer.channels, 3, 3) / (9 * layer.channels) ** 0.5
    x, weight, bias = (v.to(dtype) for v in (x, weight, torch.randn(layer.out_channels)))
    stride = 2 if layer.resize == "down" else 1

    def enlarged(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2.0) if layer.resize == "up" else x

    exact = nn.functional.conv2d(enlarged(x[:1].double()), weight.double(), bias.double(), stride, 1)
    window = ([1, 1], [stride, stride], [1, 1], 1)
    laid_out = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, list(enlarged(x).shape))
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    arms = {"oneDNN": lambda: convolve(enlarged(x), laid_out, bias, *window, "none", [], "")}
    for algorithm in ALGORITHMS:
        does = algorithm in RESIZES[layer.resize]
        packed = ops.pack_conv3x3(weight, algorithm if does else "f2", layer.resize)
        arms[algorithm] = lambda packed=packed: ops.conv3x3_packed(x, packed, bias)
    arms["chosen"] = arms[layer.fastest(batch, dtype)]
    return arms, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    net = layers()
    threads = torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {cpu_kernels()}, {threads} threads, {len(net)} layers, {options.dtype}"
    )
    for batch in options.batch:
        measure(net, batch, options.rounds, getattr(torch, options.dtype))


@torch.no_grad()
def measure(net: list[Layer], batch: int, rounds: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    built = [calls(batch, layer, dtype) for layer in net]
    arms = list(built[0][0])
    errors = {
        arm: [((run[arm]()[:1] - exact).norm() / exact.norm()).item() for run, exact in built] for arm in arms
    }
    # One thread's own time leaves out what other processes take of the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[list[float]]] = {arm: [] for arm in arms}  # by round, by layer
    for _ in tqdm(range(rounds), desc=f"batch {batch}", disable=None):
        for arm in arms:
            taken = []
            for run, _ in built:
                start = clock()
                run[arm]()
                taken.append(clock() - start)
            times[arm].append(taken)
    medians = {arm: [statistics.median(column) for column in zip(*times[arm], strict=True)] for arm in arms}

    print(f"\nbatch {batch}\n{'layer':>16s}  count  oneDNN: GFLOP/s, error", end="")
    print("".join(f"  {algorithm:>7s}" for algorithm in ALGORITHMS), "  chosen: GFLOP/s, error")
    for layer in sorted(dict.fromkeys(net), key=lambda layer: (-layer.out_side, layer.flops(1))):
        places = [k for k, other in enumerate(net) if other == layer]
        taken = {arm: sum(medians[arm][k] for k in places) for arm in arms}
        worst = {arm: max(errors[arm][k] for k in places) for arm in arms}
        speed = {arm: layer.flops(batch) * len(places) / taken[arm] / 1e9 for arm in arms}
        name = f"{layer.channels}->{layer.out_channels}@{layer.out_side}{layer.resize or ''}"
        ratios = "".join(f"  {taken['oneDNN'] / taken[algorithm]:6.2f}x" for algorithm in ALGORITHMS)
        print(
            f"{name:>16s}  {len(places):5d}  {speed['oneDNN']:15.0f} {worst['oneDNN']:.1e}{ratios}   "
            f"{layer.fastest(batch, dtype):>6s} {speed['chosen']:8.0f} {worst['chosen']:.1e}"
        )
    sums = {arm: [sum(taken) for taken in times[arm]] for arm in arms}
    for arm in arms:
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(sums["oneDNN"], sums[arm], strict=True)], n=4
        )
        each = statistics.median(sums[arm]) * 1e3 / batch
        print(f"{arm:>8s}: {each:6.1f} ms an image, {middle:.2f}x ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
