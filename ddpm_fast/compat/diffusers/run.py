"""`Run`: the rows of a diffusers scheduler, laid out where it is stepped, and the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...reference import compute_dtype, per_sample
from ...steps import COLUMNS
from .tables import Rows

NOISY = 8.0
"""The weight of x in x0 above which x0 is a small difference of large numbers, see `_scaled`. Below, rounding
in another order than diffusers costs less than 1e-5 where x and out are within 5."""


class Run:
    """The steps of one run, any of which may be taken at any time: nothing here changes but caches.

    Attributes:
        draws, finite: by row, whether diffusers draws noise there, and whether the row can be used.
        learned_range: whether ``out`` must have 2C channels.
        thresholds: whether `step` needs the function that thresholds x0.
    """

    def __init__(self, rows: Rows, timesteps: Tensor) -> None:
        self.draws: list[bool] = rows.draws.tolist()
        self.finite: list[bool] = np.isfinite(rows.rows).all(axis=1).tolist()
        self.learned_range = rows.rows.shape[1] > len(COLUMNS)
        self.thresholds = rows.thresholds
        self._rows, self._clip = rows.rows, rows.clip
        self._timesteps = timesteps
        self._times: list[int] = rows.timesteps.tolist()
        self._row_of = {t: i for i, t in reversed(list(enumerate(self._times)))}  # the first of equal ones
        self._layouts: dict[tuple[torch.device, torch.dtype], _Layout] = {}

    def locate(self, t: Any) -> int | None:
        """The row of a timestep, an int or a tensor of one int64; None for what is not of the run.

        A view into ``scheduler.timesteps``, as a loop over it gives, is located by where it lies, and no
        device is waited for; any other tensor is read.
        """
        if isinstance(t, Tensor):
            if t.dtype != torch.int64 or t.numel() != 1:
                return None
            whole = self._timesteps
            if t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                i, rest = divmod(t.storage_offset() - whole.storage_offset(), whole.stride(0))
                if rest == 0 and 0 <= i < len(self._times):
                    return self._row_of[self._times[i]]
            t = t.item()
        if isinstance(t, bool) or not isinstance(t, (int, np.integer)):
            return None
        return self._row_of.get(int(t))

    def locate_each(self, t: Tensor, device: torch.device) -> Tensor:
        """The rows of timesteps ``(B,)``, int64 on `device`; where `t` is on a GPU, which is not asked, a
        stranger to the run gets a row past the end.

        Raises:
            IndexError: a stranger, with `t` on the CPU.
        """
        if t.device.type == "cpu":
            rows = [self._row_of.get(value) for value in t.tolist()]
            if None in rows:
                stranger = t[rows.index(None)]
                raise IndexError(f"timestep must be in scheduler.timesteps, which has no {stranger}")
            return torch.tensor(rows, device=device)
        match = self._timesteps.to(t.device) == t[:, None]
        return torch.where(match.any(1), match.to(torch.int8).argmax(1), len(self._times)).to(device)

    def step(
        self,
        x: Tensor,
        out: Tensor,
        i: int | Tensor,
        noise: Tensor | None,
        *,
        x0_prev: Tensor | None = None,
        threshold: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take step `i`, an int or ``(B,)`` rows on x's device: ``(x_next, x0)`` as `ops.posterior_step`.

        `threshold` turns x0 into what the update uses, for rows that threshold; ``x0_prev`` is not for those.
        """
        key = x.device, x.dtype
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._laid_out(*key)
        index, scale, clip = layout.at(i)
        if not self.thresholds:
            x_next, x0 = ops.posterior_step(
                x, out, layout.table, index, noise=noise, x0_prev=x0_prev, clip=clip
            )
            return x_next, _times(x0, scale)
        x0 = ops.posterior_step(x, out, layout.predicting, index, clip=None)[1]
        x0 = threshold(_times(x0, scale))
        x_next, _ = ops.posterior_step(x, out, layout.updating, index, noise=noise, x0_prev=x0, clip=None)
        return x_next, x0

    def _laid_out(self, device: torch.device, dtype: torch.dtype) -> _Layout:
        if dtype == torch.float32:
            rows, scales, bounds = _scaled(self._rows, self._clip)
        else:
            rows, scales = self._rows, np.ones(len(self._rows))
            bounds = None if self._clip is None else np.full(len(rows), self._clip)

        def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            with torch.inference_mode(False):  # an inference tensor kept here would break a later backward
                return torch.tensor(array, dtype=dtype, device=device)

        predicting = updating = None
        if self.thresholds:
            predicting, updating = rows.copy(), self._rows.copy()
            predicting[:, 2:] = 0.0
            updating[:, COLUMNS.index("x_from_x0_prev")] = updating[:, COLUMNS.index("x_from_x0")]
            updating[:, : COLUMNS.index("x_from_x")] = 0.0
            predicting, updating = (tensor(some, compute_dtype(dtype)) for some in (predicting, updating))
        return _Layout(
            tensor(rows, compute_dtype(dtype)),
            predicting,
            updating,
            tensor(np.arange(len(rows)), torch.int64).unbind(),
            tensor(scales, torch.float32),
            [None if scale == 1 else scale for scale in scales.tolist()],
            None if bounds is None else tensor(bounds, torch.float32),
            [None] * len(rows) if bounds is None else bounds.tolist(),
        )


@dataclass(frozen=True, eq=False)
class _Layout:
    """A run's numbers on one device, for an x of one dtype.

    Attributes:
        table, predicting, updating: whole rows; rows that only make x0; rows that take it as x0_prev.
        indices: the number of each row, 0-d int64.
        scales, scale_of: by row, on the device and on the host, what x0 is to be multiplied by (None: 1).
        bounds, bound_of: by row likewise, of |x0| before that (None: none).
    """

    table: Tensor
    predicting: Tensor | None
    updating: Tensor | None
    indices: tuple[Tensor, ...]
    scales: Tensor
    scale_of: list[float | None]
    bounds: Tensor | None
    bound_of: list[float | None]

    def at(self, i: int | Tensor) -> tuple[Tensor, float | Tensor | None, float | Tensor | None]:
        """(index, scale, clip) of step `i`, an int or ``(B,)`` rows."""
        if isinstance(i, int):
            return self.indices[i], self.scale_of[i], self.bound_of[i]
        each = i.clamp(max=len(self.table) - 1)  # of a row past the end the op has the say
        clip = None if self.bounds is None else self.bounds.index_select(0, each)
        return i, self.scales.index_select(0, each), clip


def _times(x0: Tensor, scale: float | Tensor | None) -> Tensor:
    if scale is None:
        return x0
    if isinstance(scale, Tensor):
        scale = per_sample(scale, x0)
    return x0 * scale if x0.requires_grad else x0.mul_(scale)


def _scaled(rows: np.ndarray, clip: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """``(rows, scales, bounds)``: rows whose x0, bounded by these, is to be multiplied by `scales`.

    diffusers' x0 is `(x - sigma out) / alpha`. Where alpha is small and out close to x, the rounding of
    `sigma out` is what is left, 1e-5 and more of a picture. `2^k x - 2^k sigma out` repeats it to the bit;
    `x / alpha - (sigma / alpha) out` would have another. Rows up to `NOISY` stay as they are.
    """
    p = rows[:, COLUMNS.index("x0_from_x")]
    noisy = np.isfinite(rows).all(axis=1) & (p > NOISY)
    powers = np.exp2(np.floor(np.log2(np.where(noisy, p, 1.0))))
    scales = np.where(noisy, p / powers, 1.0).astype(np.float32)
    bounds = None
    if clip is not None:
        bound = np.float32(clip)
        for _ in range(16):  # an ulp up where a clipped x0 would not come out as the bound itself
            scales = np.where(bound / scales * scales == bound, scales, np.nextafter(scales, np.float32(2)))
        bounds = bound / scales
    scaled = rows.copy()
    scaled[noisy, 0] = powers[noisy]
    scaled[noisy, 1] *= powers[noisy] / p[noisy]
    scaled[:, COLUMNS.index("x_from_x0")] *= scales
    return scaled, scales, bounds
