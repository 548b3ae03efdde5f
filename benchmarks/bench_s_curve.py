"""The S-curve tutorial: its own loops beside `examples/s_curve.py`, in time and in what comes out.

    python benchmarks/bench_s_curve.py [--rounds 30] [--window 79]
    python benchmarks/bench_s_curve.py --quality 40000 [--seeds 3]

Times: an update, in windows of one epoch, and sampling 10,000 points in 100 steps; the arms in turn within
one process, on one thread; printed are medians, and the median and quartiles of each round's ratio. Quality:
both loops train for as many updates; the sliced Wasserstein distance of 10,000 samples to 10,000 fresh
points, beside that of other fresh points.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from s_curve import BATCH, SAMPLING, SCHEDULE, EmbeddingMLP, batches, s_curve

from ddpm_fast import Sampler
from ddpm_fast.losses import Loss
from ddpm_fast.training import TrainStep

T = len(SCHEDULE)
POINTS = 10**4
DTYPES = torch.float32, torch.bfloat16


class TutorialMLP(nn.Module):
    """The same network as its users write it."""

    def __init__(self, units: int = 128) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            [
                nn.Linear(2, units),
                nn.ReLU(),
                nn.Linear(units, units),
                nn.ReLU(),
                nn.Linear(units, units),
                nn.ReLU(),
                nn.Linear(units, 2),
            ]
        )
        self.step_embeddings = nn.ModuleList([nn.Embedding(T, units) for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for k, embedding in enumerate(self.step_embeddings):
            shift = embedding(t)
            x = self.linears[2 * k](x)
            x = x + shift
            x = self.linears[2 * k + 1](x)
        return self.linears[-1](x)


class Tutorial:
    """The tutorial's tables and loops, statement by statement."""

    def __init__(self, points: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.betas = torch.tensor(SCHEDULE.betas, dtype=torch.float32)
        alphas_bar = torch.cumprod(1 - self.betas, 0)
        self.alphas_bar_sqrt = torch.sqrt(alphas_bar)
        self.one_minus_alphas_bar_sqrt = torch.sqrt(1 - alphas_bar)
        self.loader = DataLoader(points, batch_size=BATCH, shuffle=True)
        self.model = TutorialMLP()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.updates = self._train()

    def loss(self, x0: Tensor) -> Tensor:
        t = torch.randint(0, T, size=(x0.shape[0] // 2,))
        t = torch.cat([t, T - 1 - t], dim=0)
        t = t.unsqueeze(-1)
        a = self.alphas_bar_sqrt[t]
        aml = self.one_minus_alphas_bar_sqrt[t]
        e = torch.randn_like(x0)
        x = x0 * a + e * aml
        output = self.model(x, t.squeeze(-1))
        return (e - output).square().mean()

    def _train(self) -> Iterator[None]:
        while True:
            for x0 in self.loader:
                loss = self.loss(x0)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                yield

    def p_sample(self, x: Tensor, step: int) -> Tensor:
        t = torch.tensor([step])
        coefficient = self.betas[t] / self.one_minus_alphas_bar_sqrt[t]
        eps = self.model(x, t)
        mean = (1 / (1 - self.betas[t]).sqrt()) * (x - (coefficient * eps))
        return mean + self.betas[t].sqrt() * torch.randn_like(x)

    def sample(self) -> Tensor:
        """Keeps the graph of all steps, as written: nobody in the tutorial turns gradients off."""
        x = torch.randn(POINTS, 2)
        kept = [x]
        for step in reversed(range(T)):
            x = self.p_sample(x, step)
            kept.append(x)
        return x


class Ours:
    def __init__(self, points: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = EmbeddingMLP(T)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.step = TrainStep(self.model, Loss(SCHEDULE), optimizer, clip=1.0, compile=True)
        self.updates = self._train(batches(points, torch.Generator().manual_seed(seed)))
        self.seed = seed

    def _train(self, drawn: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
        for x0, t, noise in drawn:
            self.step(x0, t, noise=noise)
            yield

    def sampler(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        sampler = Sampler(self.model, SCHEDULE, dtype=dtype, **SAMPLING)
        return lambda: sampler(POINTS, seed=self.seed)


def advance(updates: Iterator[None], count: int) -> None:
    for _ in islice(updates, count):
        pass


def sliced_wasserstein(a: Tensor, b: Tensor, slices: int = 200) -> float:
    """Mean over directions of the distance W1 between the projections (Bonneel et al. 2015, section 3)."""
    angle = torch.arange(slices, dtype=torch.float64) * (torch.pi / slices)
    directions = torch.stack([angle.cos(), angle.sin()])
    a, b = ((points.double() @ directions).sort(0).values for points in (a, b))
    return float((a - b).abs().mean())


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            seconds[name].append(timed(run))
    return seconds


def report(seconds: dict[str, list[float]], unit: str, count: int) -> None:
    peer, *others = seconds
    print(f"{peer}: {statistics.median(seconds[peer]) / count * 1e6:.0f} us {unit}")
    for name in others:
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds[name], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        took = statistics.median(seconds[name]) / count * 1e6
        print(f"{name}: {took:.0f} us {unit}, {median:.2f}x [{low:.2f}, {high:.2f}]")


def times(rounds: int, window: int) -> None:
    points = s_curve(0)
    tutorial, ours = Tutorial(points, 0), Ours(points, 0)
    print(f"first two updates of ours, which compile: {timed(lambda: advance(ours.updates, 2)):.1f} s")
    training = {"tutorial": tutorial, "ours": ours}
    arms = {name: lambda arm=arm: advance(arm.updates, window) for name, arm in training.items()}
    interleaved(arms, 2)  # warm
    report(interleaved(arms, rounds), "an update", window)
    arms = {"tutorial": tutorial.sample, "tutorial, under no_grad": torch.no_grad()(tutorial.sample)}
    arms |= {f"ours, {dtype}".replace("torch.", ""): ours.sampler(dtype) for dtype in DTYPES}
    interleaved(arms, 1)
    seconds = interleaved(arms, max(3, rounds // 3))
    report(seconds, f"a step of {POINTS} points", T)
    print("and of the tutorial under no_grad")
    del seconds["tutorial"]
    report(seconds, f"a step of {POINTS} points", T)


def quality(updates: int, seeds: int) -> None:
    print(f"{updates} updates; sliced Wasserstein distance to {POINTS} fresh points, times 1000")
    print("seed   fresh  tutorial  ours float32  ours bfloat16")
    for seed in range(seeds):
        points, fresh = s_curve(seed), s_curve(1000 + seed)
        tutorial, ours = Tutorial(points, seed), Ours(points, seed)
        for arm in (tutorial, ours):
            advance(arm.updates, updates)
        samples = [s_curve(2000 + seed), torch.no_grad()(tutorial.sample)()]
        samples += [ours.sampler(dtype)() for dtype in DTYPES]
        found = [1000 * sliced_wasserstein(x, fresh) for x in samples]
        print("{:4d}  {:6.3f}  {:8.3f}  {:12.3f}  {:13.3f}".format(seed, *found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--window", type=int, default=79)
    parser.add_argument("--quality", type=int, metavar="UPDATES")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quality is None:
        times(args.rounds, args.window)
    else:
        quality(args.quality, args.seeds)


if __name__ == "__main__":
    main()
