"""What a model is trained on: the loss of an image noised to time t, and how t is drawn.

Every target is a row of two numbers, `target = a x0 + b noise`, as x_t is; and what the network got wrong is
proportional to what it got wrong of the posterior's mean, `k (out - target)`. So a loss is a table too: the
squared error of Ho et al. 2020 (arXiv 2006.11239, eq. 14), and by `k` the weighted bound (eq. 12).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from .reference import per_sample
from .schedule import Schedule, check_int, check_number

__all__ = ["KINDS", "PREDICTIONS", "VARIANCES", "Loss", "SecondMomentSampler", "antithetic", "uniform"]

KINDS = ("mse", "rescaled_mse", "kl", "rescaled_kl")
PREDICTIONS = ("epsilon", "x0", "v", "mean")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")

OFFSET_STEP = 1  # of the training stream, whose step 0 is the noise itself


class Loss(nn.Module):
    """The training loss of each sample, ``loss(model, x0, t) -> (B,)``; its ``.mean()`` is what one descends.

    Equivalent to, for kind="mse"::

        x_t = table[t, 0] * x0 + table[t, 1] * noise
        ((model(x_t, t) - target) ** 2).flatten(1).mean(1)     # computed in float32

    It asks the host nothing, traces under ``torch.compile(fullgraph=True)`` and can be captured as a CUDA
    graph with its backward, if seed and image_index are tensors. Its tables are buffers: move it as a module.

    Args:
        schedule: what x_t is drawn with.
        prediction: what the model returns: "epsilon"; "x0"; "v" `sqrt(ab) noise - sqrt(1 - ab) x0` (Salimans
            & Ho 2022, arXiv 2202.00512); "mean", of `q(x_prev | x_t, x0)` (OpenAI's PREVIOUS_X).
        kind: in the words of OpenAI's LossType. "mse": L_simple (Ho et al., eq. 14). "kl": the term of the
            variational bound at t, in bits a dimension (eq. 12; at t = 0 the likelihood of 8-bit images in
            [-1, 1], section 3.3); "rescaled_kl": T times that, an estimate of the whole bound. With a learned
            variance "mse" is L_simple + L_t, the mean held fixed in L_t, and "rescaled_mse" weighs L_t by
            T / 1000: L_hybrid of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 16).
        variance: the model's own, see `steps.ddpm`. With "learned_range" the model returns twice the
            channels, the second half being the `v` of eq. 15. The fixed ones matter to "kl" only.
        min_snr_gamma: weigh the squared error of x0 by `min(SNR, gamma)` (Hang et al. 2023, arXiv
            2303.09556), whatever is predicted; None: by what L_simple gives it.
        offset_noise: each channel of the noise is shifted by that times a normal number of its own.
        device, dtype: of the tables: x0's device, and float32, or float64 for float64 x0.

    Raises:
        TypeError, ValueError: an unknown name or a number out of range; "rescaled_mse" without a learned
            variance; ``min_snr_gamma`` with "kl"; a bound with "epsilon" at zero terminal SNR: infinite.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "epsilon",
        *,
        kind: str = "mse",
        variance: str = "fixed_small",
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
        for name, value, allowed in (
            ("prediction", prediction, PREDICTIONS),
            ("kind", kind, KINDS),
            ("variance", variance, VARIANCES),
        ):
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        learned, bound_only = variance == "learned_range", kind in ("kl", "rescaled_kl")
        if kind == "rescaled_mse" and not learned:
            raise ValueError(f"kind 'rescaled_mse' needs variance 'learned_range', got {variance!r}")
        if min_snr_gamma is not None:
            if bound_only:
                raise ValueError(f"min_snr_gamma weighs the squared error, which kind {kind!r} has none of")
            min_snr_gamma = check_number(
                "min_snr_gamma", min_snr_gamma, lambda gamma: 0 < gamma < math.inf, "finite and above 0"
            )
        offset_noise = check_number(
            "offset_noise", offset_noise, lambda strength: 0 <= strength < math.inf, "finite and at least 0"
        )
        has_bound = learned or bound_only
        if has_bound and prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            raise ValueError("at zero terminal SNR epsilon says nothing of x0: the bound needs 'v' or 'x0'")

        self.prediction, self.kind, self.variance = prediction, kind, variance
        self.min_snr_gamma, self.offset_noise, self.T = min_snr_gamma, offset_noise, schedule.T
        self.bound_scale = {"rescaled_kl": schedule.T, "rescaled_mse": schedule.T / 1000}.get(kind, 1.0)
        tables = {
            "table": np.stack([schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod], axis=1),
            "target": _targets(schedule, prediction) if prediction in ("v", "mean") else None,
            "weight": None if min_snr_gamma is None else _min_snr(schedule, prediction, min_snr_gamma),
            "bound": _bounds(schedule, prediction, variance) if has_bound else None,
        }
        for name, array in tables.items():
            tensor = None if array is None else torch.tensor(array, device=device, dtype=dtype)
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        model: Any,
        x0: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        image_index: int | Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, (B,) float32 (float64 for float64 x0).

        Args:
            model: ``model(x_t, t) -> out``, or ``model(x_t, t, class_labels)``.
            x0: (B, C, ...) floating, at least two dimensions.
            t: (B,) int64 in [0, T).
            noise: like x0. Without it, drawn by the counter from seed and image_index, in the pass that reads
                x0 (`ops.q_sample_counter`: sample b of the same numbers has the same noise in any batch and
                process); without those, by torch's default generator.
            seed, image_index: see `ops.q_sample_counter`; both or neither.
            class_labels: handed to the model.

        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape, dtype or device; an out that does not
                fit.
            IndexError: t outside [0, T) (on a GPU, which is not asked, the sample is NaN).
        """
        if (seed is None) != (image_index is None) or (noise is not None and seed is not None):
            raise ValueError("give noise, or both seed and image_index, or none of the three")
        if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.dim() < 2:
            given = f"{tuple(x0.shape)} {x0.dtype}" if isinstance(x0, Tensor) else type(x0).__name__
            raise TypeError(f"x0 must be a floating Tensor of at least two dimensions, got {given}")
        if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x0.shape[:1]:
            given = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"t must be an int64 Tensor of shape ({len(x0)},), one per sample, got {given}")
        if x0.device != self.table.device:
            raise ValueError(f"x0 must be on {self.table.device}, where the loss is, got {x0.device}")
        x_t, noise = self._noised(x0, t, noise, seed, image_index)
        out = model(x_t, t) if class_labels is None else model(x_t, t, class_labels)
        learned = self.variance == "learned_range"
        shape = (x0.shape[0], x0.shape[1] * (2 if learned else 1), *x0.shape[2:])
        if not isinstance(out, Tensor) or out.shape != shape:
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must return a Tensor of shape {shape}, got {given}")
        out, v = out.chunk(2, dim=1) if learned else (out, None)

        target = {"epsilon": noise, "x0": x0}.get(self.prediction)
        if target is None:
            target = ops.q_sample(x0, noise, t, self.target)
        error = out.to(self.table.dtype) - target.to(self.table.dtype)
        if self.kind in ("kl", "rescaled_kl"):
            return self._bound(error, v, x0, t)
        mse = error.square().flatten(1).mean(1)
        if self.weight is not None:
            mse = mse * self.weight.index_select(0, t)
        return mse if v is None else mse + self._bound(error.detach(), v, x0, t)

    def _noised(
        self, x0: Tensor, t: Tensor, noise: Tensor | None, seed: Any, image_index: Any
    ) -> tuple[Tensor, Tensor]:
        counted = seed is not None
        if counted and self.offset_noise == 0:
            return ops.q_sample_counter(x0, t, self.table, seed, image_index)
        if counted:
            noise = ops.counter_normal(x0.shape, seed, image_index, 0, stream="training").to(x0.dtype)
        elif noise is None:
            noise = torch.randn_like(x0)
        if self.offset_noise > 0:
            of_channel = tuple(x0.shape[:2])
            if counted:
                offset = ops.counter_normal(of_channel, seed, image_index, OFFSET_STEP, stream="training")
            else:
                offset = torch.randn(of_channel, device=x0.device)
            offset = offset.to(x0.dtype).reshape(*of_channel, *[1] * (x0.dim() - 2))
            noise = noise + self.offset_noise * offset
        return ops.q_sample(x0, noise, t, self.table), noise

    def _bound(self, error: Tensor, v: Tensor | None, x0: Tensor, t: Tensor) -> Tensor:
        rows = self.bound.index_select(0, t)
        nats = bound_term(x0.to(error.dtype), per_sample(rows[:, 0], error) * error, t, rows[:, 1:], v)
        return nats * (self.bound_scale / math.log(2))

    def extra_repr(self) -> str:
        given = f"T={self.T}, prediction={self.prediction!r}, kind={self.kind!r}, variance={self.variance!r}"
        return f"{given}, min_snr_gamma={self.min_snr_gamma}, offset_noise={self.offset_noise}"


def _targets(schedule: Schedule, prediction: str) -> np.ndarray:
    """(T, 2): the target's weights of x0 and of the noise."""
    root, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    if prediction == "v":
        return np.stack([-noise, root], axis=1)
    of_x0, of_x = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    return np.stack([of_x0 + of_x * root, of_x * noise], axis=1)


def _min_snr(schedule: Schedule, prediction: str, gamma: float) -> np.ndarray:
    """(T,): what makes of the target's squared error `min(SNR, gamma)` times that of x0."""
    snr = schedule.snr
    with np.errstate(divide="ignore"):
        by_snr = np.minimum(1.0, gamma / snr)  # min(SNR, gamma) / SNR, whose limit at SNR 0 is 1
    return {
        "epsilon": by_snr,
        "x0": np.minimum(snr, gamma),
        "v": np.minimum(snr, gamma) / (snr + 1.0),
        "mean": np.minimum(snr, gamma) / schedule.posterior_mean_coef1**2,
    }[prediction]


def _bounds(schedule: Schedule, prediction: str, variance: str) -> np.ndarray:
    """(T, 4): k, with `true mean - model's mean = k (out - target)`; log-variances: the true, low, high."""
    root, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    of_x0 = schedule.posterior_mean_coef1
    k = {
        "epsilon": lambda: of_x0 * noise / root,
        "x0": lambda: -of_x0,
        "v": lambda: of_x0 * noise,
        "mean": lambda: -np.ones(schedule.T),
    }[prediction]()
    return np.concatenate([k[:, None], log_variances(schedule, variance)], axis=1)


def log_variances(schedule: Schedule, variance: str) -> np.ndarray:
    """(T, 3), for `bound_term`: the log-variance of the true posterior; of the model, or its range's ends."""
    small = schedule.posterior_log_variance_clipped
    with np.errstate(divide="ignore"):
        large = np.log(schedule.betas)
    low = small
    if variance == "fixed_large":  # at t = 0 OpenAI takes the small one, for a better likelihood
        low = np.append(small[:1], large[1:])
    return np.stack([small, low, large], axis=1)


def bound_term(x0: Tensor, apart: Tensor, t: Tensor, logs: Tensor, v: Tensor | None) -> Tensor:
    """KL(q(x_prev | x_t, x0) || p(x_prev | x_t)); at t = 0 -log p(x0 | x_t): (B,), in nats a dimension.

    Ho et al. 2020, eq. 5. ``apart`` is the true mean less the model's, ``logs`` (B, 3) the rows of
    `log_variances`, ``v`` what a model with a learned range says. All in one dtype, but for v.
    """
    true_log, low, high = (per_sample(column, apart) for column in logs.unbind(1))
    log_var = low
    if v is not None:
        fraction = (v.to(apart.dtype) + 1) / 2
        log_var = fraction * high + (1 - fraction) * low
    kl = normal_kl(apart, true_log, log_var)
    first = per_sample(t == 0, apart)
    # Elsewhere the likelihood is not used: its gradient must not be 0 times inf there.
    likelihood = log_likelihood(x0, torch.where(first, apart, 0.0), torch.where(first, log_var, 0.0))
    return torch.where(first, -likelihood, kl).flatten(1).mean(1)


def normal_kl(apart: Tensor, log_var: Tensor, other: Tensor) -> Tensor:
    """KL(N(m, exp(log_var)) || N(m - apart, exp(other))) of each element, in nats."""
    ratio = log_var - other
    return 0.5 * (ratio.expm1() - ratio + apart.square() * (-other).exp())


def log_likelihood(x: Tensor, from_mean: Tensor, log_var: Tensor) -> Tensor:
    """log p(x) of 8-bit images in [-1, 1], a Gaussian integrated over each level (Ho et al., eq. 13).

    ``from_mean`` is x less the mean. The distribution function is the tanh approximation that Ho's and
    OpenAI's codes use, so that bits compare.
    """
    inverse_std = torch.exp(-0.5 * log_var)
    above = normal_cdf(inverse_std * (from_mean + 1 / 255))
    below = normal_cdf(inverse_std * (from_mean - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# How t is drawn


def uniform(
    batch: int,
    T: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t for each sample, (B,) int64, each alike (Ho et al. 2020, algorithm 1)."""
    return torch.randint(T, (check_int("batch", batch, 1),), device=device, generator=generator)


def antithetic(
    batch: int,
    T: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t for the first half of the batch and T - 1 - t for the second: each alike, and their mean steadier.

    (B,) int64. Of an odd batch the first half has one more, whose partner is left out.
    """
    batch = check_int("batch", batch, 1)
    t = torch.randint(T, ((batch + 1) // 2,), device=device, generator=generator)
    return torch.cat([t, T - 1 - t])[:batch]


class SecondMomentSampler(nn.Module):
    """Draws t in proportion to the root mean square of its last losses (Nichol & Dhariwal 2021, eq. 18).

    Until every t has ``history`` losses it draws them alike; then it mixes in ``uniform_probability``::

        t, weight = sampler(len(x0))
        losses = loss(model, x0, t)
        (weight * losses).mean().backward()
        sampler.update(t, losses.detach())

    Its state is buffers, which a checkpoint holds; it asks the host nothing. In several processes update each
    one's with the gathered t and losses of all, and they stay alike.

    Args:
        T: the number of timesteps.
        history, uniform_probability: as in the paper, 10 and 0.001.

    Raises:
        TypeError, ValueError: T or history below 1, or uniform_probability outside (0, 1].
    """

    def __init__(
        self,
        T: int,
        *,
        history: int = 10,
        uniform_probability: float = 0.001,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.T, self.history = check_int("T", T, 1), check_int("history", history, 1)
        self.uniform_probability = check_number(
            "uniform_probability", uniform_probability, lambda p: 0 < p <= 1, "in (0, 1]"
        )
        # The last place takes what is written to none.
        self.register_buffer("squares", torch.zeros(self.T * self.history + 1, device=device))
        self.register_buffer("counts", torch.zeros(self.T, dtype=torch.int64, device=device))

    def probabilities(self) -> Tensor:
        """Of each t, float64 (T,)."""
        rms = self.squares[:-1].reshape(self.T, self.history).double().mean(1).sqrt()
        p = rms / rms.sum() * (1 - self.uniform_probability) + self.uniform_probability / self.T
        warm = (self.counts >= self.history).all() & (rms.sum() > 0)
        return torch.where(warm, p, 1 / self.T)

    def forward(self, batch: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(t, weight)``, int64 and float32 (B,): ``weight = 1 / (T p(t))`` keeps the mean loss unbiased."""
        p = self.probabilities()
        u = torch.rand(
            check_int("batch", batch, 1), dtype=torch.float64, device=p.device, generator=generator
        )
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=self.T - 1)  # the sum may end below 1
        return t, (1 / (self.T * p.index_select(0, t))).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take each sample's unweighted loss, (B,), in the batch's order: the oldest of its t makes way."""
        if losses.shape != t.shape or t.dim() != 1:
            raise ValueError(
                f"t and losses must be (B,), got shapes {tuple(t.shape)} and {tuple(losses.shape)}"
            )
        same = t[:, None] == t[None, :]
        before, after = same.tril(-1).sum(1), same.triu(1).sum(1)
        place = t * self.history + (self.counts.index_select(0, t) + before) % self.history
        place = torch.where(after < self.history, place, self.squares.numel() - 1)
        self.squares.index_copy_(0, place, losses.to(self.squares.dtype).square())
        self.counts.index_add_(0, t, torch.ones_like(t))
