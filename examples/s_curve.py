"""The tutorial of diffusion on points, whole: an S-curve of 10,000 points, 100 steps, a small MLP.

    pip install "ddpm_fast[examples]"
    python examples/s_curve.py [--out s_curve] [--updates 40000] [--seed 0] [--no-compile]

Writes the forward process (forward.png, every 5th step, and forward.gif) and, from the trained network, the
reverse one (reverse.png, every 10th step, and reverse.gif). `benchmarks/bench_s_curve.py` sets its training
and its samples beside the tutorial's own loops.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import make_s_curve
from torch import Tensor, nn
from tqdm import tqdm

from ddpm_fast import Sampler, Schedule, ops, pictures
from ddpm_fast.losses import Loss, antithetic
from ddpm_fast.training import TrainStep

SCHEDULE = Schedule.sigmoid_betas(100)
BATCH = 128
SAMPLING = {"method": "ddpm", "variance": "fixed_large", "clip": None}
PIXELS = 128


class EmbeddingMLP(nn.Module):
    """Three hidden layers of 128 units on a point (B, 2), each shifted by an embedding of t (B,)."""

    sample_shape = (2,)

    def __init__(self, T: int = 100, units: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, units) for size in (2, units, units))
        self.times = nn.ModuleList(nn.Embedding(T, units) for _ in self.layers)
        self.out = nn.Linear(units, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        one = t.stride(0) == 0  # one time for all points, as when sampling: its embedding is a bias
        for layer, time in zip(self.layers, self.times, strict=True):
            x = F.linear(x, layer.weight, layer.bias + time(t[0])) if one else layer(x) + time(t)
            x = F.relu(x)
        return self.out(x)


def s_curve(seed: int | None, count: int = 10**4) -> Tensor:
    """(count, 2) float32."""
    points, _ = make_s_curve(count, noise=0.1, random_state=seed)
    return torch.tensor(points[:, [0, 2]] / 10, dtype=torch.float32)


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


def picture(points: Tensor) -> np.ndarray:
    """Points as uint8 (PIXELS, PIXELS, 3), in a window as wide as all but the outermost need."""
    edge = max(float(points.abs().quantile(0.99)), 1e-6)
    counts, _, _ = np.histogram2d(
        points[:, 1].numpy(), points[:, 0].numpy(), bins=PIXELS, range=[[-edge, edge]] * 2
    )
    ink = np.minimum(counts[::-1] / 3, 1.0)[..., None]
    return (255 - ink * (255 - np.array([30, 90, 160]))).astype(np.uint8)


def write(frames: list[Tensor], every: int, columns: int, out: Path) -> None:
    """out.png: every ``every``-th frame, the last among them; out.gif: all."""
    drawn = [picture(points) for points in frames]
    strip = torch.from_numpy(np.stack(drawn[every - 1 :: every])).permute(0, 3, 1, 2)
    pictures.write(strip, out.with_suffix(".png"), "png-grid", columns=columns)
    first, *rest = (Image.fromarray(pixels) for pixels in drawn)
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
