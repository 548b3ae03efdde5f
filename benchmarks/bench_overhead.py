"""What a step costs beside the model: our DDIM loop against diffusers', with a model that does nothing.

    python benchmarks/bench_overhead.py [--rounds 20] [--steps 50]

Both loops run in one process, one after the other in every round; printed is the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ddpm_fast import Sampler, Schedule

SHAPE = (3, 8, 8)


def trivial(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x


def their_loop(num_steps: int):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()

    @torch.no_grad()
    def run() -> torch.Tensor:
        """`DDIMPipeline.__call__` without its pictures and its progress bar."""
        x = torch.randn((1, *SHAPE))
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps:
            out = trivial(x, t)
            x = scheduler.step(out, t, x, eta=0.0, use_clipped_model_output=False).prev_sample
        return x

    return run


def measure(rounds: int, num_steps: int) -> tuple[float, float, list[float]]:
    """Median seconds a step of theirs and ours, and the ratio of each round."""
    sampler = Sampler(trivial, Schedule.linear(), method="ddim", num_steps=num_steps)
    arms = (their_loop(num_steps), lambda: sampler(1, shape=SHAPE))
    for run in arms:
        run()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, seconds in zip(arms, times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append((time.perf_counter() - start) / num_steps)
    ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    theirs, ours, ratios = measure(args.rounds, args.steps)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"diffusers {theirs * 1e6:.1f} us a step, ours {ours * 1e6:.1f} us", end=": ")
    print(f"{median:.1f}x [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main()
