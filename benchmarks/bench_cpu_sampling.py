"""Whole DDIM runs on the CPU: google/ddpm-cifar10-32's U-Net with random weights, in diffusers and here.

    python benchmarks/bench_cpu_sampling.py [--batch 1 8] [--steps 50] [--rounds 5] [--compile]

One process, arms interleaved round by round; medians, and quartiles of the rounds' ratios to the pipeline as
it is shipped. Both start from the same noise; the error is that of the first step's x0, relative to its
largest value: what an untrained network makes of it in 50 steps says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import ddpm_fast
from ddpm_fast import checkpoint

CONFIG = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def arms(batch: int, steps: int, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    pipe = diffusers.DDIMPipeline(diffusers.UNet2DModel(**CONFIG).eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    model, schedule, options = checkpoint.load_diffusers(pipe)
    run = {"method": "ddim", "num_steps": steps, **options}
    samplers = {
        "float32": ddpm_fast.Sampler(model, schedule, **run),
        "bfloat16": ddpm_fast.Sampler(model, schedule, dtype=torch.bfloat16, **run),
    }
    if compiled:
        samplers["float32, compiled"] = ddpm_fast.Sampler(model, schedule, compile=True, **run)
        samplers["bfloat16, compiled"] = ddpm_fast.Sampler(
            model, schedule, dtype=torch.bfloat16, compile=True, **run
        )

    def diffusers_pipeline() -> Tensor:
        images = pipe(batch, torch.Generator().manual_seed(1), num_inference_steps=steps, output_type="np")[0]
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def ours(sampler: ddpm_fast.Sampler) -> Callable[[], Tensor]:
        return lambda: sampler(batch, generator=torch.Generator().manual_seed(1), noise="torch")

    return {"diffusers": diffusers_pipeline} | {name: ours(sampler) for name, sampler in samplers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    for batch in options.batch:
        run = arms(batch, options.steps, options.compile)
        once = arms(batch, 1, options.compile)
        exact = once["diffusers"]()
        errors = {
            name: ((arm() - exact).abs().max() / exact.abs().max()).item() for name, arm in once.items()
        }
        for arm in run.values():
            arm()
        times: dict[str, list[float]] = {name: [] for name in run}
        for _ in tqdm(range(options.rounds), desc=f"batch {batch}", disable=None):
            for name, arm in run.items():
                start = time.perf_counter()
                arm()
                times[name].append(time.perf_counter() - start)
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(times["diffusers"], taken, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            each = statistics.median(taken) * 1e3 / batch / options.steps
            print(
                f"batch {batch:3d}  {name:20s} {each:7.1f} ms an image and step   {middle:.2f}x "
                f"({low:.2f}-{high:.2f})   error {errors[name]:.1e}"
            )


if __name__ == "__main__":
    main()
