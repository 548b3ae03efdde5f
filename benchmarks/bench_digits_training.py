"""The whole update of the digits preset beside diffusers' own way, on the same U-Net: seconds an update.

    python benchmarks/bench_digits_training.py [--threads 1 2] [--rounds 20] [--window 4]

Theirs is the loop of diffusers' unconditional training example: `UNet2DModel`, `DDPMScheduler.add_noise`,
`get_velocity`, AdamW and `EMAModel`. Ours is `Trainer`'s update: batch, times and noise, forward, backward,
clip, AdamW and `Ema`. Windows of both take turns; the ratio is the median of the windows' ratios (and their
quartiles), by the clock, and by this process's time on the processor, which other work on the machine
lengthens less. Peak memory is that of a process of each one's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from ddpm_fast import UNet
from ddpm_fast.compat.peers import diffusers as peer
from ddpm_fast.training import Config, Trainer
from ddpm_fast.training.data import digits

CONFIG = dataclasses.replace(Config.read("digits"), updates=10**6)


def theirs() -> Callable[[], None]:
    (images, _), _ = digits()
    torch.manual_seed(0)
    model = peer.unet(UNet(CONFIG.unet)).train()
    given = CONFIG.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, given.betas, weight_decay=given.weight_decay)
    average = EMAModel(model.parameters(), decay=CONFIG.ema[0])
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def update() -> None:
        x0 = images[torch.randint(len(images), (CONFIG.batch,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (CONFIG.batch,))
        out = model(scheduler.add_noise(x0, noise, t), t).sample
        F.mse_loss(out, scheduler.get_velocity(x0, noise, t)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return update


def ours(folder: str, precision: str) -> Callable[[], None]:
    trainer = Trainer(dataclasses.replace(CONFIG, precision=precision), folder, bar=False)
    return trainer.updates().__next__


ARMS = {
    "diffusers": lambda folder: theirs(),
    "ours, float32": lambda folder: ours(f"{folder}/float32", "float32"),
    "ours, bfloat16": lambda folder: ours(f"{folder}/bfloat16", "bfloat16"),
}
PEAK_AFTER = 6  # updates


def timed(arms: dict[str, Callable[[], None]], threads: int, rounds: int, window: int) -> None:
    torch.set_num_threads(threads)
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
    for update in arms.values():
        update()
        update()
    for _ in range(rounds):
        for name, update in arms.items():
            start = [clock() for clock in clocks]
            for _ in range(window):
                update()
            seconds[name].append(tuple((c() - s) / window for c, s in zip(clocks, start, strict=True)))
    print(f"threads: {threads}")
    for name, found in seconds.items():
        told = []
        for k in range(len(clocks)):
            ratios = [a[k] / b[k] for a, b in zip(seconds["diffusers"], found, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            milliseconds = statistics.median(times[k] for times in found) * 1e3
            told.append(f"{milliseconds:7.1f} ms {middle:5.2f}x ({low:.2f} to {high:.2f})")
        print(f"  {name:16} an update: {told[0]}; of the processor {told[1]}")


def peak(name: str) -> None:
    """This process's largest memory, of which the interpreter and the libraries are a part."""
    with tempfile.TemporaryDirectory() as folder:
        update = ARMS[name](folder)
        before = _megabytes("VmRSS")
        for _ in range(PEAK_AFTER):
            update()
        print(f"  {name:16} peak {_megabytes('VmHWM'):6.0f} MiB, {before:.0f} before the first update")


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--peak", choices=ARMS, help="of one arm alone, in this process")
    args = parser.parse_args()
    if args.peak is not None:
        torch.set_num_threads(args.threads[0])
        peak(args.peak)
        return
    print("memory:", flush=True)
    for name in ARMS:
        alone = [sys.executable, __file__, "--peak", name, "--threads", str(args.threads[0])]
        subprocess.run(alone, check=True)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: build(folder) for name, build in ARMS.items()}
        for threads in args.threads:
            timed(arms, threads, args.rounds, args.window)


if __name__ == "__main__":
    main()
