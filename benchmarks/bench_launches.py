"""Ops that a step dispatches, with google/ddpm-cifar10-32's U-Net: ours, and diffusers'.

    python benchmarks/bench_launches.py [--batch 4]

Counted is what computes or copies: on a GPU each is a kernel or more that the host launches. Views and
uninitialised memory are not. Nothing is computed: the tensors are fake ones, of the CPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Schedule, UNet, steps
from ddpm_fast.bench.networks import CIFAR
from ddpm_fast.checkpoint.diffusers import unet_config
from ddpm_fast.engine import Buffers, Network, advancing

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}  # allocate, or are views too


class Count(TorchDispatchMode):
    """Counts the ops that compute or copy, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "prim" and func.overloadpacket.__name__ not in FREE:
            self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> Counter[str]:
    with Count() as counted:
        step()
    return counted.ops


def our_step(batch: int) -> Counter[str]:
    """Of the step that a CUDA graph captures: U-Net, update, and the row that moves on."""
    table = steps.ddim(Schedule.linear(), 50)
    timesteps, rows = table.timesteps_tensor(), table.tensor()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = Network(UNet(CIFAR).eval(), None, False)
        x, i = torch.empty(batch, 3, 32, 32), torch.zeros((), dtype=torch.int64)
        times = network.time_rows(timesteps)
        buffers = Buffers(x=x, x0=None, i=i, table=rows, timesteps=timesteps, rows=times)
        return count(advancing(network.bind(buffers, 1.0), buffers, lambda: None))


def their_step(batch: int) -> Counter[str]:
    """Of `DDIMPipeline`'s: U-Net and scheduler."""
    from diffusers import DDIMScheduler, UNet2DModel

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = UNet2DModel.from_config(unet_config(CIFAR)).eval()
        x = torch.empty(batch, 3, 32, 32)
        return count(lambda: scheduler.step(model(x, 500).sample, 500, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    for name, step in (("ours", our_step), ("diffusers", their_step)):
        ops = step(args.batch)
        print(f"{name}: {ops.total()} ops a step")
        for op, number in ops.most_common():
            print(f"  {number:4} {op}")


if __name__ == "__main__":
    main()
