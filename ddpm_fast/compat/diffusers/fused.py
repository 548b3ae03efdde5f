"""What the schedulers share: a run that is laid out once, the forward process, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops._dispatch import is_transformed
from ...reference import compute_dtype
from .run import Run
from .tables import NotATable, Rows

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16)
MOST_RUNS = 4
"""Settings that one layout of timesteps is kept for. An eta of its own for each step would otherwise have all
steps laid out for each: those are diffusers' to take."""


class Fused:
    """Stands before a scheduler class of diffusers, for what is to be said once.

    Attributes:
        strict: True repeats diffusers' quirks, False corrects them, as each scheduler lists. Of the class or
            of an object, not of the config: it is not saved.
    """

    strict: bool = True
    _kept_run: tuple[Any, ...] = (None, None)
    _kept_levels: tuple[Any, ...] = (None, None)

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)
        if type(self).__module__.startswith(f"{__package__}."):
            # By it a pipeline writes where a component is to be loaded from: anyone can load its folder.
            self.__module__ = "diffusers"

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept, which goes by the identity of tensors: a copy's are others."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_kept_")}

    def _run(self, rows: Callable[[], Rows], *settings: Any, of: tuple[Tensor, ...] = ()) -> Run | None:
        """The run as it stands, for each of `settings`: laid out again where its timesteps, levels or config,
        or a tensor of `of`, are not those of the last call. None if `rows` says it is no table, for more
        settings than `MOST_RUNS`, and where plain operations are due."""
        if plain_is_due():
            return None
        held = (self.timesteps, self.alphas_cumprod, *of, self._internal_dict)
        key = (*map(_identity, held), self.num_inference_steps, self.strict)
        if self._kept_run[0] != key:
            self._kept_run = key, {}, held  # held: so that no other object takes an id that is in the key
        runs = self._kept_run[1]
        if settings not in runs and len(runs) < MOST_RUNS:
            try:
                runs[settings] = Run(rows(), self.timesteps)
            except NotATable:
                runs[settings] = None
        return runs.get(settings)

    def _levels(self, make: Callable[[torch.dtype], Any], x: Tensor, *of: Tensor) -> Any:
        """What `make` makes of the tensors `of`, in the dtype that x is computed in; kept while they last."""
        dtype, held = compute_dtype(x.dtype), (*of, self._internal_dict)
        key = (*map(_identity, held), dtype, x.device)
        if self._kept_levels[0] != key:
            with torch.inference_mode(False):  # an inference tensor kept here would break a later backward
                self._kept_levels = key, make(dtype), held
        return self._kept_levels[1]


class FusedOverTraining(Fused):
    """Whose forward process is over the T training timesteps: DDPM and DDIM."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """diffusers' `add_noise` in one pass, by `ops.q_sample`; differentiable.

        The one deliberate difference: for a half type the levels stay float32. diffusers rounds
        ``alphas_cumprod`` to the type, and adds no noise at all at the first 2 timesteps in float16, 10 in
        bfloat16.
        """
        t = times_of(original_samples, noise, timesteps)
        if t is None:
            return super().add_noise(original_samples, noise, timesteps)
        return ops.q_sample(original_samples, noise, t, self._tables(original_samples)[0])

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """diffusers' `get_velocity`, as `add_noise`."""
        t = times_of(sample, noise, timesteps)
        if t is None:
            return super().get_velocity(sample, noise, timesteps)
        return ops.q_sample(noise, sample, t, self._tables(sample)[1])

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 2) for q_sample, of x_t and of v."""
        self.alphas_cumprod = self.alphas_cumprod.to(device=x.device)  # for good, as diffusers does

        def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            alphas_cumprod = self.alphas_cumprod.to(dtype)
            alpha, sigma = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
            return torch.stack([alpha, sigma], 1), torch.stack([alpha, -sigma], 1)

        return self._levels(make, x, self.alphas_cumprod)

    def _row(self, run: Run | None, timestep: Any, x: Tensor) -> int | Tensor | None:
        """The row of a timestep, or the rows (B,) of one a sample; None where diffusers is to judge."""
        if run is None:
            return None
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            one_each = timestep.shape == x.shape[:1] and timestep.dtype in INTEGERS
            return run.locate_each(timestep.long(), x.device) if one_each else None
        i = run.locate(timestep)
        return i if i is not None and run.finite[i] else None


def plain_is_due() -> bool:
    """Whether diffusers' plain operations are to run: in a trace, whose compiler fuses them, and where
    torch.func or forward mode transforms them, since an op looks at the timesteps' values."""
    return torch.compiler.is_compiling() or is_transformed()


def fits(value: Any, x: Any, channels: int = 1) -> bool:
    """Whether an op takes `value` beside x: its like, with `channels` times its channels."""
    return (
        isinstance(x, Tensor)
        and isinstance(value, Tensor)
        and x.dtype in FLOATING
        and x.dim() >= 2
        and value.dtype == x.dtype
        and value.device == x.device
        and value.shape == (x.shape if channels == 1 else (len(x), channels * x.shape[1], *x.shape[2:]))
    )


def times_of(x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor | None:
    """Timesteps as `ops.q_sample` takes them; None where diffusers' own code is to judge."""
    if (
        plain_is_due()
        or not fits(noise, x)
        or not isinstance(timesteps, Tensor)
        or timesteps.dtype not in INTEGERS
    ):
        return None
    t = timesteps.to(x.device, torch.int64).flatten()
    if len(t) == 1:
        return t[0]
    return t if len(t) == len(x) else None


def _identity(held: Any) -> Any:
    """Another number where a tensor is another, or was written to."""
    if isinstance(held, Tensor) and not held.is_inference():
        return id(held), held._version
    return id(held)
