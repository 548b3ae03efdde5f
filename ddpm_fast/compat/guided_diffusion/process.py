"""The forward process, and what a model says of the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...losses import Loss
from ...reference import compute_dtype, per_sample
from ...schedule import Schedule, cached_tensor
from .kinds import LossType, ModelMeanType, ModelVarType
from .tables import level, posterior, rows

Model = Callable[..., Any]
DenoisedFn = Callable[[Tensor], Tensor]
Kwargs = dict[str, Any] | None
Terms = dict[str, Tensor]

PACKAGE = __package__.rpartition(".")[0] + "."
_PREDICTIONS = {
    ModelMeanType.PREVIOUS_X: "mean",
    ModelMeanType.START_X: "x0",
    ModelMeanType.EPSILON: "epsilon",
}
_LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
_WITHIN_A_STEP = (
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
)
"""What a step computes in one pass, without a call of these."""
_ARRAYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


class Process:
    """What `GaussianDiffusion` takes its steps with; its arguments and attributes are described there."""

    _carried: tuple[str, ...] = ()
    """What `p_mean_variance` has beside its four, which a sample's dict is to have too."""
    _is_all_state: bool = True
    """Whether all of x is denoised, so that a run can be `Sampler`'s."""

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        for name in _WITHIN_A_STEP:
            if not self._is_ours(name):
                raise TypeError(
                    f"{type(self).__name__} has a {name} of its own, which no step would call: "
                    "override p_mean_variance"
                )
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        betas = np.array(betas, dtype=np.float64)
        assert betas.ndim == 1, f"betas must be 1-D, got shape {betas.shape}"
        assert (betas > 0).all() and (betas <= 1).all(), "betas must be in (0, 1]"
        self._schedule = Schedule.from_betas(betas)
        self.num_timesteps = len(betas)
        for name in _ARRAYS:
            setattr(self, name, np.array(getattr(self._schedule, name)))
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self._tables: dict[Any, tuple[np.ndarray, dict[Any, Tensor]]] = {}
        self._losses: dict[Any, Loss] = {}

    # The forward process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(mean, variance, log_variance)`` of q(x_t | x_0), each like x_start (Ho et al. 2020, eq. 4)."""
        x = floating(x_start)
        return (
            self._at("sqrt_alphas_cumprod", t, x) * x,
            self._at("one_minus_alphas_cumprod", t, x),
            self._at("log_one_minus_alphas_cumprod", t, x),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t drawn from q(x_t | x_0) with the noise given, or drawn by torch's own generator."""
        if noise is None:
            noise = torch.randn_like(x_start)
        assert noise.shape == x_start.shape, _unlike("noise", noise, x_start)
        x = floating(x_start)
        return ops.q_sample(x, noise.to(x.dtype), index(t, x), self._schedule)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(mean, variance, clipped log_variance)`` of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        assert x_start.shape == x_t.shape, _unlike("x_start", x_start, x_t)
        x = floating(x_t)
        weights = self._laid_out("posterior", x, lambda: posterior(self._schedule))
        return (
            ops.q_sample(x_start.to(x.dtype), x, index(t, x), weights),
            self._at("posterior_variance", t, x),
            self._at("posterior_log_variance_clipped", t, x),
        )

    # The model's

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """p(x_{t-1} | x_t): a dict of ``mean, variance, log_variance, pred_xstart``, each like x.

        Args:
            model: ``model(x, t, **model_kwargs) -> out``.
            clip_denoised: clip the prediction of x_0 to [-1, 1].
            denoised_fn: applied to that prediction before it is clipped.

        Raises:
            AssertionError: t is not (B,), or what the model returns is not of the shape that its mean and
                variance type ask for.
        """
        x, out, more = self._evaluate(model, x, t, model_kwargs)
        clips = clip_denoised and denoised_fn is None
        mean, x0 = ops.posterior_step(
            x, out, self._table("mean", x), index(t, x), clip=1.0 if clips else None
        )
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
            x0 = x0.clamp(-1, 1) if clip_denoised else x0
            if self.model_mean_type is not ModelMeanType.PREVIOUS_X:
                mean = self.q_posterior_mean_variance(x0, x, t)[0]
        variance, log_variance = self._variance(x, out, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0, **more}

    def _evaluate(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """``(state, out, more)``: what is denoised, what the model returned of it, and what beside that."""
        assert t.shape == (len(x),), f"t must have shape ({len(x)},), one a sample, got {tuple(t.shape)}"
        out, more = self._call(model, x, t, model_kwargs or {})
        x = floating(self._state(x))
        shape = (len(x), x.shape[1] * (2 if self._learned else 1), *x.shape[2:])
        assert out.shape == shape, f"the model must return {shape}, got {tuple(out.shape)}"
        return x, out.to(x.dtype), more

    def _call(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        return self._wrap_model(model)(x, self._scale_timesteps(t), **model_kwargs), {}

    def _state(self, x: Tensor) -> Tensor:
        return x

    def _wrap_model(self, model: Model) -> Model:
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _variance(self, x: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(variance, log_variance)``, like x."""
        v, kind = out[:, x.shape[1] :], self.model_var_type
        if kind is ModelVarType.LEARNED:
            return v.exp(), v
        if kind is ModelVarType.LEARNED_RANGE:  # Nichol & Dhariwal 2021, eq. 15
            fraction = (v + 1) / 2
            small, large = (self._at(name, t, x) for name in ("posterior_log_variance_clipped", "log_betas"))
            log = fraction * large + (1 - fraction) * small
            return log.exp(), log
        if kind is ModelVarType.FIXED_SMALL:
            return self._at("posterior_variance", t, x), self._at("posterior_log_variance_clipped", t, x)
        return self._at("fixed_large", t, x), self._at("log_fixed_large", t, x)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        assert x_t.shape == eps.shape, _unlike("eps", eps, x_t)
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        assert x_t.shape == xprev.shape, _unlike("xprev", xprev, x_t)
        return (
            self._at("recip_posterior_mean_coef1", t, x_t) * xprev
            - self._at("posterior_mean_ratio", t, x_t) * x_t
        )

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart
        return scaled / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Terms, x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """The mean moved by the variance times ``cond_fn(x, t, **model_kwargs)``, the gradient at x_t of a
        log-probability (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 1)."""
        gradient = self._wrap_model(cond_fn)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        mean = p_mean_var["mean"]
        return mean + p_mean_var["variance"] * gradient.to(mean.dtype)

    def condition_score(
        self, cond_fn: Model, p_mean_var: Terms, x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Terms:
        """`p_mean_variance` had the score had ``cond_fn``'s gradient added (the same, algorithm 2).

        With `eps - sqrt(1 - ab) gradient` for eps, x_0 moves by `(1 - ab) / sqrt(ab) gradient`: it is not
        clipped again.
        """
        gradient = self._wrap_model(cond_fn)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        x0 = p_mean_var["pred_xstart"]
        x0 = x0 + self._at("x0_from_gradient", t, x0) * gradient.to(x0.dtype)
        mean = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]
        return p_mean_var | {"pred_xstart": x0, "mean": mean}

    # What the rest is made of

    @property
    def _prediction(self) -> str:
        if self.model_mean_type not in _PREDICTIONS:
            raise NotImplementedError(self.model_mean_type)
        return _PREDICTIONS[self.model_mean_type]

    @property
    def _learned(self) -> bool:
        return self.model_var_type in _LEARNED

    def _is_ours(self, *methods: str) -> bool:
        """Whether nobody has replaced these: what would be left out must be called."""
        return all(
            name not in vars(self) and getattr(type(self), name).__module__.startswith(PACKAGE)
            for name in methods
        )

    def _rows(self, kind: str, eta: float = 0.0, of_x0: bool = False) -> np.ndarray:
        variance = self.model_var_type.name.lower()
        return rows(self._schedule, kind, "x0" if of_x0 else self._prediction, variance, eta)

    def _table(self, kind: str, x: Tensor, eta: float = 0.0, of_x0: bool = False) -> Tensor:
        key = kind, self.model_mean_type, self.model_var_type, eta, of_x0
        return self._laid_out(key, x, lambda: self._rows(kind, eta, of_x0))

    def _laid_out(self, key: Any, x: Tensor, make: Callable[[], np.ndarray]) -> Tensor:
        """A table on x's device, in the dtype that x is computed in; made and copied there once."""
        if key not in self._tables:
            self._tables[key] = make(), {}
        array, kept = self._tables[key]
        return cached_tensor(kept, array, x.device, compute_dtype(x.dtype))

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """An array of `tables.level` at t, expanded to the shape of x."""
        column = self._laid_out(name, x, lambda: level(self._schedule, name))
        return per_sample(column.index_select(0, index(t, x)), x).expand(x.shape)


def floating(x: Tensor) -> Tensor:
    """x in the dtype that it is computed in."""
    return x.to(compute_dtype(x.dtype))


def index(t: Tensor, x: Tensor) -> Tensor:
    """t as an op takes it: int64 (B,). IndexError for a floating one, as by an array there."""
    if t.is_floating_point():
        raise IndexError(f"t must be of integers, got {t.dtype}")
    return t.long() if len(t) == len(x) else t.long().expand(len(x)).contiguous()


def _unlike(name: str, given: Tensor, x: Tensor) -> str:
    return f"{name} must have the shape {tuple(x.shape)}, got {tuple(given.shape)}"
