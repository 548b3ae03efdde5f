"""The whole update of the digits preset beside diffusers' own way, on the same U-Net: seconds an update.

    python benchmarks/bench_digits_training.py [--threads 2] [--rounds 20] [--window 4]

Theirs is the loop of diffusers' unconditional training example: `UNet2DModel`, `DDPMScheduler.add_noise`,
`get_velocity`, AdamW and `EMAModel`. Ours is `Trainer`'s update: batch, times and noise, forward, backward,
clip, AdamW and `Ema`. Windows of both take turns; the ratio is the median of the windows' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--window", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        arms = {"diffusers": theirs()}
        arms |= {f"ours, {kind}": ours(f"{folder}/{kind}", kind) for kind in ("float32", "bfloat16")}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for update in arms.values():
            update()
            update()
        for _ in range(args.rounds):
            for name, update in arms.items():
                start = time.perf_counter()
                for _ in range(args.window):
                    update()
                seconds[name].append((time.perf_counter() - start) / args.window)
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["diffusers"], found, strict=True))
        print(f"{name:16} {statistics.median(found) * 1e3:7.1f} ms an update  {ratio:5.2f}x")
    print(f"peak memory of all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
