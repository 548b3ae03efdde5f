"""diffusers' schedulers with the fused step. Each is diffusers' own class where nothing is said here."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from .fused import Fused, FusedOverTraining, fits, times_of
from .run import Run
from .tables import Rows, ddim_rows, ddpm_rows, dpm_solver_rows, ends_in_first_order

__all__ = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]

Generators = torch.Generator | list[torch.Generator] | None


class DDPMScheduler(FusedOverTraining, diffusers.DDPMScheduler):
    """diffusers' DDPMScheduler, whose `step`, `add_noise` and `get_velocity` are one pass over memory each.

    A step is within 1e-5 of diffusers' in float32; in float16 and bfloat16 it is nearer to the truth, as it
    rounds once. It draws the same noise. A gradient passes through it.

    `step` also takes a timestep for each sample, ``(B,)`` integers of ``scheduler.timesteps``. Noise is then
    drawn at every step of a run that draws any.

    No device is waited for where the timestep is a view into ``scheduler.timesteps``, as ``for t in
    scheduler.timesteps`` gives it, but at the first step after `set_timesteps`, which lays out the run. Any
    other tensor of one timestep is read.

    diffusers' own step runs for ``variance_type="learned"``, for a timestep that is not of the run, where the
    step's coefficients are not finite ("epsilon" at zero terminal SNR), for a sample and an output that are
    not alike, and in a subclass with, say, a `_get_variance` of its own.

    ``strict = False``, on the object or the class, corrects two quirks, in steps that are not diffusers' own:

    - No noise is added to the finished picture. diffusers does so where the last timestep is not 0. It is
      drawn all the same.
    - "fixed_large_log" is the root of beta. It is NaN in diffusers, and with ``strict`` a ValueError.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """diffusers' `step`, in one pass.

        Raises:
            ValueError: "fixed_large_log" with ``strict``; and what diffusers raises.
            IndexError: a sample's timestep that is not of the run. A GPU is not asked: there that sample is
                NaN.
        """
        run = self._run(lambda: ddpm_rows(self), self.custom_timesteps, self.variance_type)
        i = self._row(run, timestep, sample)
        if i is None or not fits(model_output, sample, 2 if run.learned_range else 1):
            return super().step(model_output, timestep, sample, generator, return_dict)
        draws = run.draws[i] if isinstance(i, int) else any(run.draws)
        noise = _drawn_like(sample, generator) if draws else None
        x, x0 = run.step(sample, model_output, i, noise, threshold=self._threshold_sample)
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


class DDIMScheduler(FusedOverTraining, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler, whose `step`, `add_noise` and `get_velocity` are one pass over memory each.

    In precision, draws, timesteps and waiting as `DDPMScheduler`. diffusers' own step runs for a timestep
    that is not of the run, where the step's coefficients are not finite, for tensors that are not alike, for
    the fifth and further etas of a run, and in a subclass that steps in its own way.

    ``strict = False``, on the object or the class, corrects one quirk, in steps that are not diffusers' own:
    a step ends at the noise level that the next one starts from. diffusers takes that of ``t - T // N``,
    which is another with "linspace" spacing, and with "trailing" where N does not divide T.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """diffusers' `step`, in one pass.

        Raises:
            ValueError: what diffusers raises.
            IndexError: as `DDPMScheduler.step`.
        """
        clipped = bool(use_clipped_model_output)
        settings = float(eta), clipped
        run = self._run(lambda: ddim_rows(self, *settings), *settings, of=(self.final_alpha_cumprod,))
        i = self._row(run, timestep, sample)
        noise = variance_noise if eta > 0 else None
        given_well = noise is None or (generator is None and fits(noise, sample))
        if i is None or not given_well or not fits(model_output, sample):
            options = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *options)
        if eta > 0 and noise is None:
            noise = _drawn_like(sample, generator)
        x, x0 = run.step(sample, model_output, i, noise, threshold=self._threshold_sample)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


class DPMSolverMultistepScheduler(Fused, diffusers.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler, whose `step` and `add_noise` are one pass over memory each.

    A step is within 1e-5 of diffusers' in float32; in float16 and bfloat16 it is nearer to the truth. The
    device is waited for at the first step of a run only. ``strict`` corrects nothing here.

    diffusers' own step runs for algorithms other than "dpmsolver++" and for ``solver_order=3``, for
    thresholding with a ``sample_max_value`` other than 1, where the step's coefficients are not finite, for
    tensors that are not alike, and in a subclass that steps in its own way; its own `add_noise` after
    `set_begin_index`.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """diffusers' `step`, in one pass.

        Raises:
            ValueError: what diffusers raises.
        """
        run = self._run(self._rows, of=(self.sigmas,))
        i = None if run is None else self._next_row(run, timestep)
        out, x0_prev, second_order = model_output, None, False
        if i is not None:
            second_order = i >= len(self.timesteps)
            x0_prev = self.model_outputs[-1] if second_order else None
            if self.config.variance_type in ("learned", "learned_range"):
                out = out[:, :3] if self.config.prediction_type == "epsilon" else out  # as in diffusers
        if i is None or not fits(out, sample) or (second_order and not fits(x0_prev, sample)):
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        x, x0 = run.step(sample, out, i, None, x0_prev=x0_prev)
        self.model_outputs = [*self.model_outputs[1:], x0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _rows(self) -> Rows:
        """The steps of first order, then those of second."""
        first, second = dpm_solver_rows(self)
        rows, draws = np.concatenate([first.rows, second.rows]), np.tile(first.draws, 2)
        return Rows(first.timesteps, rows, draws, first.clip)

    def _next_row(self, run: Run, timestep: int | Tensor) -> int | None:
        """The row of the step that is due; None where diffusers' own is to judge."""
        if self.step_index is None:
            self._init_step_index(timestep)
        i, N = self.step_index, len(self.timesteps)
        if i >= N:
            return None
        first_order = self.config.solver_order == 1 or self.lower_order_nums < 1
        if not first_order and not (i == N - 1 and ends_in_first_order(self)):
            i += N
        return i if run.finite[i] else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """diffusers' `add_noise` in one pass, by `ops.q_sample`; differentiable. The levels stay float32."""
        t = times_of(original_samples, noise, timesteps)
        if t is None or timesteps.dim() == 0 or self.begin_index is not None:
            return super().add_noise(original_samples, noise, timesteps)

        def make(dtype: torch.dtype) -> Tensor:
            """``(T + 1, 2)``: the level that diffusers looks up for each timestep; last, for any other."""
            times = self.timesteps.long().tolist()
            index = torch.full((self.config.num_train_timesteps + 1,), len(times) - 1)
            seen: dict[int, int] = {}
            for k, time in enumerate(times):
                seen[time] = seen.get(time, 0) + 1
                if seen[time] <= 2:  # of equal timesteps the second
                    index[time] = k
            sigmas = self.sigmas[index].to(original_samples.device, dtype)
            return torch.stack(self._sigma_to_alpha_sigma_t(sigmas), 1)

        table = self._levels(make, original_samples, self.timesteps, self.sigmas)
        other = len(table) - 1
        return ops.q_sample(original_samples, noise, torch.where((t < 0) | (t > other), other, t), table)


def _drawn_like(sample: Tensor, generator: Generators) -> Tensor:
    """Noise as diffusers draws it."""
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
