"""The tutorial of diffusion on points, whole: an S-curve of 10,000 points, 100 steps, a small MLP.

    pip install "ddpm_fast[examples]"
    python examples/s_curve.py [--out s_curve] [--updates 40000] [--seed 0] [--no-compile]

Writes the forward process (forward.png, every 5th step, and forward.gif) and, from the trained network, the
reverse one (reverse.png, every 10th step, and reverse.gif). ``ddpm-fast train --preset s-curve`` trains the
same network, with checkpoints and a log. `benchmarks/bench_s_curve.py` sets training and samples beside the
tutorial's own loops.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpm_fast import Sampler, Schedule, ops, pictures
from ddpm_fast.losses import Loss, antithetic
from ddpm_fast.training import EmbeddingMLP, TrainStep
from ddpm_fast.training.data import s_curve
from ddpm_fast.training.points import picture

SCHEDULE = Schedule.sigmoid_betas(100)
BATCH = 128
SAMPLING = {"method": "ddpm", "variance": "fixed_large", "clip": None}


def batches(points: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x0, t, noise) without end: one permutation after another, and an epoch's t and noise in one draw."""
    whole, T = len(points) // BATCH, len(SCHEDULE)
    while True:
        order = torch.randperm(len(points), generator=generator)[: whole * BATCH]
        x0 = points[order].reshape(whole, BATCH, 2)
        t = torch.stack([antithetic(BATCH, T, generator=generator) for _ in range(whole)])
        noise = torch.randn(x0.shape, generator=generator)
        yield from zip(x0.unbind(), t.unbind(), noise.unbind(), strict=True)


def train(points: Tensor, updates: int, seed: int, compile: bool) -> EmbeddingMLP:
    torch.manual_seed(seed)
    model = EmbeddingMLP(len(SCHEDULE))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    step = TrainStep(model, Loss(SCHEDULE), optimizer, clip=1.0, compile=compile)
    bar = tqdm(total=updates, unit="update")
    drawn = batches(points, torch.Generator().manual_seed(seed))
    for update, (x0, t, noise) in enumerate(islice(drawn, updates), 1):
        loss, _ = step(x0, t, noise=noise)
        if update % 100 == 0 or update == updates:
            bar.update(update - bar.n)
            bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()
    return model.eval()


def write(frames: list[Tensor], every: int, columns: int, out: Path) -> None:
    """out.png: every ``every``-th frame, the last among them; out.gif: all."""
    drawn = torch.stack([picture(points) for points in frames])
    pictures.write(drawn[every - 1 :: every], out.with_suffix(".png"), "png-grid", columns=columns)
    first, *rest = (Image.fromarray(pixels) for pixels in drawn.permute(0, 2, 3, 1).contiguous().numpy())
    first.save(out.with_suffix(".gif"), save_all=True, append_images=rest, duration=60, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("s_curve"))
    parser.add_argument("--updates", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    pictures.check_writable(args.out, "png-dir")
    torch.set_num_threads(1)  # a second thread waits longer than it works on so small a network

    points = s_curve(args.seed)
    table, noise = SCHEDULE.tensor(), torch.randn(points.shape)
    forward = [ops.q_sample(points, noise, t, table) for t in range(len(SCHEDULE))]
    write(forward, 5, 10, args.out / "forward")

    model = train(points, args.updates, args.seed, not args.no_compile)
    sampler = Sampler(model, SCHEDULE, **SAMPLING)
    reverse = [x for _, _, x, _ in sampler.trajectory(len(points), seed=args.seed)]
    write(reverse, 10, 10, args.out / "reverse")
    for name in ("forward.png", "forward.gif", "reverse.png", "reverse.gif"):
        print(args.out / name)


if __name__ == "__main__":
    main()
