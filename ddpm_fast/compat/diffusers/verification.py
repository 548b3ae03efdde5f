"""What `verify` found: errors, pixels and speed, as a table and as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ... import pictures

AMPLIFIED = 64
"""What the difference is multiplied by in the picture: four levels and more are white."""

TOLERANCES = {
    torch.float32: (0.001, 0.0),
    torch.float16: (0.0625, 0.001),
    torch.bfloat16: (0.5, 0.05),
}
"""The largest shares of pixel values that may differ by one level of 255, and by more.

A level is 2/255 wide, so an error e of x moves a value over a rounding boundary with probability e / (2/255):
the share of values that are off by one is 127.5 times the mean error. float32's 0.1 % is a mean error of
8e-6, or 66 eps: what each operation of a run rounds adds up. For the halves a mean error of eps / 2 is
allowed, 2^-11 and 2^-8; normally distributed, bfloat16's puts 3 % of the values off by more than one.
"""


@dataclass(frozen=True, eq=False)
class Verification:
    """What `verify` found.

    Attributes:
        names: of the original and of ours.
        method: of both, "ddpm", "ddim", or the scheduler's class.
        timesteps: (N,) the training time at the start of each step.
        errors: (N,) max |x - x'| of the states after each step; the last is that of the whole run.
        relative_errors: (N,) the same over max |x|, x being the original's.
        off_by_one, off_by_more: the shares of uint8 pixel values that differ by one level, and by more.
        tolerance: the largest such shares, see `TOLERANCES`.
        seconds: medians of a run of ``timed_steps`` steps of the original and of ours.
        original, ours: uint8 (B, ...) on the CPU.
    """

    names: tuple[str, str]
    method: str
    timesteps: tuple[int, ...]
    errors: tuple[float, ...]
    relative_errors: tuple[float, ...]
    off_by_one: float
    off_by_more: float
    tolerance: tuple[float, float]
    timed_steps: int
    seconds: tuple[float, float]
    original: Tensor = field(repr=False)
    ours: Tensor = field(repr=False)

    @property
    def speed(self) -> float:
        """How many times as fast ours is."""
        return self.seconds[0] / self.seconds[1]

    @property
    def ok(self) -> bool:
        """Whether the pixels are within tolerance and every state was finite."""
        within = self.off_by_one <= self.tolerance[0] and self.off_by_more <= self.tolerance[1]
        return within and all(map(math.isfinite, self.errors))

    def __str__(self) -> str:
        N = len(self.errors)
        shown = sorted({round(k * (N - 1) / 9) for k in range(10)})
        lines = [
            f"original: {self.names[0]}",
            f"ours: {self.names[1]}",
            f"run: {self.method}, {N} steps, batch {len(self.original)}",
            f"{'step':>8} {'t':>6} {'max error':>11} {'relative':>11}",
            *(
                f"{k + 1:8} {self.timesteps[k]:6} {self.errors[k]:11.1e} {self.relative_errors[k]:11.1e}"
                for k in shown
            ),
        ]
        for words, share, most in (
            ("off by 1", self.off_by_one, self.tolerance[0]),
            ("off by more", self.off_by_more, self.tolerance[1]),
        ):
            lines.append(f"pixels {words}: {100 * share:.3g} % (at most {100 * most:.3g} %)")
        original, ours = (f"{1e3 * seconds:.1f} ms" for seconds in self.seconds)
        lines.append(
            f"speed: {self.speed:.2f}x ({self.timed_steps} steps in {ours}, the original's in {original})"
        )
        lines.append(f"within tolerance: {'yes' if self.ok else 'no'}")
        return "\n".join(lines)

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG, a row an image: the original, ours, and their difference times `AMPLIFIED`.

        Raises:
            ValueError: the images have a number of channels that PNG does not have, or are none.
            OSError: ``path`` cannot be written.
        """
        if self.ours.dim() != 4:
            raise ValueError(f"a picture is of images (B, C, H, W), these are {tuple(self.ours.shape)}")
        path = Path(path)
        pictures.check_channels(self.ours.shape[1], "png-grid")
        pictures.check_writable(path, "png-grid")
        difference = (self.original.int() - self.ours.int()).abs() * AMPLIFIED
        difference = difference.clamp(max=255).to(torch.uint8)
        difference[:, 3:] = 255  # opaque, or it would not be seen
        rows = torch.stack([self.original, self.ours, difference], 1).flatten(0, 1)
        pictures.write(rows, path, "png-grid", columns=3)
