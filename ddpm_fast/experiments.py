"""`ddpm-fast bpd`, `progressive` and `interpolate`: a checkpoint and images to numbers and pictures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, likelihood, pictures, training
from .bench import plot, report
from .sampler import to_uint8
from .schedule import Schedule
from .unet import UNet

SHOWN = 8
"""Images of which `progressive` shows how they are decoded."""
STDOUT = Path("-")

Draw = Callable[[str, str, Iterable[float], str, Iterable[float]], None]
"""``draw(title, x's name, x, y's name, y)``."""


@dataclass(frozen=True)
class Asked:
    """What the three commands are asked for: see their options."""

    folder: Path
    data: str | None
    n: int
    seed: int
    batch_size: int
    device: torch.device
    json_to: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("--n", self.n), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.json_to not in (None, STDOUT):
            report.check_writable(self.json_to)

    def load(self, count: int) -> tuple[UNet, Schedule, dict[str, Any], Tensor]:
        """The model, its schedule, the settings that belong to it, and the first ``count`` images for it.

        Of a model with classes the settings have the images' own, as ``class_labels``.
        """
        model, schedule, settings = checkpoint.load(self.folder)
        size = None if model.config.sample_size is None else model.sample_shape[1:]
        labelled = model.config.num_class_embeds is not None
        if self.data is None:
            held_out, labels = training.data.digits()[1]
            images = training.data.InMemory(held_out, self.device, labels)
        else:
            images = training.data.load(
                self.data,
                channels=model.config.in_channels,
                size=size,
                crop=False,
                strict=False,
                labelled=labelled,
                device=self.device,
                tell=lambda text: print(text, file=sys.stderr),
            )
        shape = (model.config.in_channels, *(size or images.shape[1:]))
        if images.shape != shape:
            has = "the held-out digits are" if self.data is None else "the data is"
            raise ValueError(f"--data: the model's images are {shape}, {has} {images.shape}")
        if count > len(images):
            raise ValueError(f"--n {self.n} takes {count} images, the data has {len(images)}")
        settings, first = checkpoint.of_model(settings), torch.arange(count)
        if labelled:
            x0, labels = images.take_labelled(first)
            settings["class_labels"] = labels.to(self.device)
        else:
            x0 = images.take(first)
        return model.to(self.device), schedule, settings, x0.to(self.device)

    def tell(self, lines: list[str], numbers: dict[str, Any]) -> None:
        """Lines to stdout and the numbers to a file; or the numbers alone to stdout."""
        numbers = {"n": self.n, "seed": self.seed} | numbers
        numbers = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in numbers.items()}
        if self.json_to == STDOUT:
            lines = [json.dumps(numbers)]
        elif self.json_to is not None:
            report.write(self.json_to, json.dumps(numbers, indent=1).encode())
        print(*lines, sep="\n")


def bpd(asked: Asked, out: Path | None) -> None:
    """Bits a dimension of images, each term of them drawn over t."""
    draw = _plotter("--out", out, "bpd.png")
    model, schedule, settings, x0 = asked.load(asked.n)
    start = time.perf_counter()
    bits = likelihood.bits_per_dim(
        model, schedule, x0, **settings, seed=asked.seed, batch_size=asked.batch_size, progress=True
    )
    total, seconds = bits.total.mean(), time.perf_counter() - start
    means = {name: getattr(bits, name).mean(0) for name in ("vb", "x0_mse", "mse")}
    draw("Bits/dim, term by term", "t", range(schedule.T), "bits/dim", means["vb"].tolist())
    parts = f"prior {bits.prior.mean():.4f}, steps {means['vb'][1:].sum():.4f}, decoder {means['vb'][0]:.4f}"
    line = f"{total:.4f} bits/dim of {asked.n} images: {parts} ({seconds:.1f} s, {asked.device})"
    asked.tell([line], settings | {"total": bits.total, "prior": bits.prior} | means)


def progressive(asked: Asked, out: Path, plot_to: Path | None) -> None:
    """The rate-distortion curve of progressive decoding, and what a receiver sees of the first images."""
    draw = _plotter("--plot", plot_to, "rate-distortion.png")
    pictures.check_png("--out", out)
    model, schedule, settings, x0 = asked.load(asked.n)
    pictures.check_channels(x0.shape[1], "png-grid")
    times = torch.linspace(schedule.T - 1, 0, SHOWN + 1).round().long().unique().flip(0).tolist()
    found = likelihood.progressive(
        model, schedule, x0, times, **settings, seed=asked.seed, batch_size=asked.batch_size, progress=True
    )
    total = found.bits.total.mean()
    rate, distortion = found.bits.rate.mean(0), found.bits.distortion.mean(0)
    draw("Progressive decoding", "bits/dim", rate.tolist(), "RMSE in [0, 255]", distortion.tolist())
    _write_rows(torch.cat([found.x0, x0[:, None]], 1)[:SHOWN], out)
    lines = [f"t {t:4}: {rate[t]:.4f} bits/dim, {distortion[t]:6.2f} of 255 off" for t in times]
    lines.append(f"{out}: what is seen at these t, and the images, {total:.4f} bits/dim")
    asked.tell(lines, settings | {"total": total, "rate": rate, "distortion": distortion})


def interpolate(asked: Asked, t: int | None, mixes: int, method: str, steps: int | None, out: Path) -> None:
    """Images k and n + k, and between them the mixes, a row a pair; in classes, of image k's."""
    if mixes < 2:
        raise ValueError(f"--mixes must be at least 2, got {mixes}")
    pictures.check_png("--out", out)
    model, schedule, settings, x0 = asked.load(2 * asked.n)
    pictures.check_channels(x0.shape[1], "png-grid")
    t = schedule.T // 2 if t is None else t
    labels = settings.pop("class_labels", None)
    lambdas = torch.linspace(0, 1, mixes).tolist()
    start, rows = time.perf_counter(), []
    for first in range(0, asked.n, asked.batch_size):
        a, b = (end[first : first + asked.batch_size] for end in x0.chunk(2))
        options = {"method": method, "num_steps": steps, "seed": asked.seed, "first_image": first}
        if labels is not None:
            options["class_labels"] = labels[first : first + len(a)]
        found = likelihood.interpolate(
            model, schedule, a, b, t, lambdas, **settings, **options, progress=True
        )
        rows.append(torch.cat([a[:, None], found, b[:, None]], 1))
    _write_rows(torch.cat(rows), out)
    seconds = time.perf_counter() - start
    print(f"{out}: {asked.n} pairs with {mixes} mixes at t = {t}, in {seconds:.1f} s ({asked.device})")


def _plotter(option: str, given: Path | None, default: str) -> Draw:
    """What draws a curve to the file that is given, checked now; or to the default one, where it can."""
    if given is None and (reason := plot.why_not()):
        print(f"{default} is not drawn: {reason}", file=sys.stderr)
        return lambda *_: None
    path = given or Path(default)
    form = plot.form_of(path, option)
    report.check_writable(path)

    def draw(title: str, x_name: str, x: Iterable[float], y_name: str, y: Iterable[float]) -> None:
        rows = [dict(zip((x_name, y_name), point, strict=True)) for point in zip(x, y, strict=True)]
        curve = report.Picture("curve", title, x_name, y_name)
        report.write(path, plot.draw([report.Table(title, title, [], rows, pictures=[curve])], form))

    return draw


def _write_rows(images: Tensor, out: Path) -> None:
    """(rows, columns, C, H, W) as one picture."""
    pictures.write(to_uint8(images.flatten(0, 1)).cpu(), out, "png-grid", columns=images.shape[1])
