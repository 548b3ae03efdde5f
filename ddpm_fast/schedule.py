"""What training fixed: the T betas of the forward process, and the arrays that the papers derive from them.

The forward process is `x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise` with `ab = cumprod(1 - betas)` and
t = 0 .. T-1 (Ho et al. 2020, arXiv 2006.11239, eq. 4). Everything here is numpy float64: a beta derived again
from a float32 `alphas_cumprod`, as each step of a respaced run must, is off by up to 4.9e-4 of itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["Schedule"]


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; TypeError for a bool or a non-integer, ValueError if out of range."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def check_number(name: str, value: Any, allowed: Callable[[float], bool], words: str) -> float:
    """`value` as a float for which `allowed` holds; TypeError for a non-number, ValueError saying `words`."""
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})") from None
    if not allowed(number):  # a NaN fails every comparison, so it lands here
        raise ValueError(f"{name} must be {words}, got {number}")
    return number


def read_only(array: np.ndarray) -> np.ndarray:
    """`array` itself, no longer writeable."""
    array.flags.writeable = False
    return array


def cached_tensor(
    cache: dict[Any, torch.Tensor],
    array: np.ndarray,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`array` as a tensor, copied once per (device, dtype) and kept in `cache`."""
    import torch

    device = torch.empty(
        0, device=device
    ).device  # the GPU that "cuda" is now, which may be another one later
    key = (device, dtype)
    if key not in cache:
        with torch.inference_mode(False):  # an inference tensor kept here would break a later backward pass
            tensor = torch.tensor(array, dtype=dtype, device=device)
        if type(tensor) is not torch.Tensor:  # a fake one, of a trace, must not outlive it
            return tensor
        cache[key] = tensor
    return cache[key]


def _vector(name: str, values: Any) -> np.ndarray:
    """A read-only float64 copy of a non-empty 1-D sequence of finite real numbers."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a 1-D array of real numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a 1-D array of real numbers, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be 1-D and not empty, got shape {array.shape}")
    array = array.astype(np.float64)  # always a copy
    _refuse(~np.isfinite(array), name, array, "finite")
    return read_only(array)


def _refuse(bad: np.ndarray, name: str, array: np.ndarray, allowed: str) -> None:
    if bad.any():
        t = int(bad.argmax())
        raise ValueError(f"{name} must be {allowed}, got {name}[{t}] = {array[t]} (T = {len(array)})")


def _betas(values: Any, allow_zero: bool) -> np.ndarray:
    betas = _vector("betas", values)
    early_one = (betas == 1) & (np.arange(len(betas)) < len(betas) - 1)
    too_low, low = (betas < 0, "[0") if allow_zero else (betas <= 0, "(0")
    _refuse(too_low | (betas > 1) | early_one, "betas", betas, f"in {low}, 1), or 1 as the last")
    return betas


def _alphas_cumprod(values: Any) -> np.ndarray:
    ab = _vector("alphas_cumprod", values)
    early_zero = (ab == 0) & (np.arange(len(ab)) < len(ab) - 1)
    _refuse((ab < 0) | (ab >= 1) | early_zero, "alphas_cumprod", ab, "in (0, 1), or 0 as the last")
    _refuse(np.diff(ab, prepend=1.0) > 0, "alphas_cumprod", ab, "non-increasing")
    return ab


def _check_beta_ends(beta_start: Any, beta_end: Any) -> tuple[float, float]:
    beta_start, beta_end = (
        check_number(name, value, lambda beta: 0 < beta < 1, "in (0, 1)")
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end))
    )
    return beta_start, beta_end


def _derived(function: Callable[[Schedule], np.ndarray]) -> cached_property[np.ndarray]:
    """A property computed once: a read-only float64 array of shape (T,)."""

    def compute(self: Schedule) -> np.ndarray:
        with np.errstate(divide="ignore"):  # at zero terminal SNR 1 / 0 = inf is the right value
            return read_only(function(self))

    compute.__doc__ = function.__doc__
    return cached_property(compute)


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The noise schedule a model was trained with. Immutable; every array is read-only float64, shape (T,).

    Build one with a constructor below. Made directly, `betas` and `alphas_cumprod` are kept as they are, and
    it is the caller who says that they belong together.

    Args:
        betas: variances of `q(x_t | x_{t-1})`, in [0, 1); the last may be 1 (zero terminal SNR).
        alphas_cumprod: `cumprod(1 - betas)`, in (0, 1) and never rising; the last may be 0.

    Raises:
        TypeError: an array holds something other than real numbers.
        ValueError: an array is empty, not 1-D, not finite or out of range, or the lengths differ.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    def __post_init__(self) -> None:
        betas, alphas_cumprod = _betas(self.betas, allow_zero=True), _alphas_cumprod(self.alphas_cumprod)
        if len(betas) != len(alphas_cumprod):
            raise ValueError(f"betas has length {len(betas)} but alphas_cumprod has {len(alphas_cumprod)}")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    # Constructors

    @classmethod
    def from_betas(cls, betas: Any) -> Schedule:
        """The schedule of these betas, shape (T,): an array, sequence or CPU tensor.

        Raises:
            TypeError: not real numbers.
            ValueError: empty, not 1-D, NaN, or outside (0, 1]; a beta of 1 may only be the last.
        """
        betas = _betas(betas, allow_zero=False)
        return cls(betas, np.cumprod(1.0 - betas))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> Schedule:
        """The schedule whose cumulative products are exactly these, shape (T,); `betas = 1 - ab / ab_prev`.

        Given the float32 `alphas_cumprod` of another library, steps are made of that library's own values.

        Raises:
            TypeError: not real numbers.
            ValueError: empty, not 1-D, NaN, outside (0, 1), or rising; a 0 may only be the last. A value of
                1, as half precision rounds 0.9999 to, is refused: x_t would hold no noise to remove.
        """
        alphas_cumprod = _alphas_cumprod(alphas_cumprod)
        return cls(1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), alphas_cumprod)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas evenly spaced (Ho et al. 2020, section 4). OpenAI scales both ends by 1000 / T: pass them so.

        Raises:
            TypeError, ValueError: T is not an integer of at least 1, or an end lies outside (0, 1).
        """
        T = check_int("T", T, 1)
        return cls.from_betas(np.linspace(*_check_beta_ends(beta_start, beta_end), T))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Betas whose roots are evenly spaced (Rombach et al. 2022, arXiv 2112.10752: latent diffusion).

        Raises:
            TypeError, ValueError: T is not an integer of at least 1, or an end lies outside (0, 1).
        """
        T = check_int("T", T, 1)
        beta_start, beta_end = _check_beta_ends(beta_start, beta_end)
        return cls.from_betas(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """`ab(u) = cos^2(pi/2 (u + s) / (1 + s))` over u in [0, 1], each beta at most `max_beta`.

        Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17; "squaredcos_cap_v2" in diffusers.

        Raises:
            TypeError, ValueError: T is not an integer of at least 1, s is below 0, or max_beta not in (0, 1].
        """
        T = check_int("T", T, 1)
        s = check_number("s", s, lambda s: 0 <= s < math.inf, "finite and at least 0")
        ab = np.cos((np.arange(T + 1) / T + s) / (1 + s) * (math.pi / 2)) ** 2
        return cls.from_betas(_capped_betas(ab, max_beta))

    @classmethod
    def sigmoid(cls, T: int = 1000, start: float = -3, end: float = 3, tau: float = 1.0) -> Schedule:
        """`ab(u)` falls from 1 to 0 as `sigmoid(-(start + u (end - start)) / tau)`, each beta at most 0.999.

        Jabri et al. 2022, arXiv 2212.11972, and Chen 2023, arXiv 2301.10972; "sigmoid" in
        denoising-diffusion-pytorch.

        Raises:
            TypeError, ValueError: T is not an integer of at least 1, tau is not positive, or start >= end.
        """
        T = check_int("T", T, 1)
        start = check_number("start", start, math.isfinite, "finite")
        end = check_number("end", end, lambda end: start < end < math.inf, f"finite and above start {start}")
        tau = check_number("tau", tau, lambda tau: 0 < tau < math.inf, "finite and above 0")
        fall = _sigmoid(-np.linspace(start, end, T + 1) / tau)
        return cls.from_betas(_capped_betas((fall - fall[-1]) / (fall[0] - fall[-1]), 0.999))

    @classmethod
    def sigmoid_betas(cls, T: int = 100, beta_start: float = 1e-5, beta_end: float = 0.5e-2) -> Schedule:
        """Betas on an S-curve, `sigmoid(linspace(-6, 6, T)) (beta_end - beta_start) + beta_start`.

        The defaults are those of the tutorials on 2-D data; "sigmoid" in diffusers (from GeoDiff, Xu et al.
        2022, arXiv 2203.02923) has other ends.

        Raises:
            TypeError, ValueError: T is not an integer of at least 1, or an end lies outside (0, 1).
        """
        T = check_int("T", T, 1)
        beta_start, beta_end = _check_beta_ends(beta_start, beta_end)
        return cls.from_betas(_sigmoid(np.linspace(-6, 6, T)) * (beta_end - beta_start) + beta_start)

    def rescale_zero_terminal_snr(self) -> Schedule:
        """A new schedule whose last `alphas_cumprod` is exactly 0: `sqrt(ab)` shifted, then scaled.

        Lin et al. 2023, arXiv 2305.08891, algorithm 1. At its last timestep x_t holds no trace of x0, so the
        model must predict v or x0.

        Raises:
            ValueError: T is 1, or the whole schedule has one noise level: its ends cannot be told apart.
        """
        root = self.sqrt_alphas_cumprod
        if root[0] == root[-1]:
            raise ValueError(f"zero terminal SNR needs alphas_cumprod to fall, got {self!r}")
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return Schedule.from_alphas_cumprod(alphas_cumprod)

    # Arrays of the papers

    @property
    def T(self) -> int:
        """The number of training timesteps."""
        return len(self.betas)

    @_derived
    def alphas(self) -> np.ndarray:
        """`1 - betas`."""
        return 1.0 - self.betas

    @_derived
    def alphas_cumprod_prev(self) -> np.ndarray:
        """`alphas_cumprod` of the timestep before; 1 at t = 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @_derived
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        """The weight of x0 in x_t (Ho et al., eq. 4)."""
        return np.sqrt(self.alphas_cumprod)

    @_derived
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        """The weight of the noise in x_t (Ho et al., eq. 4)."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @_derived
    def log_one_minus_alphas_cumprod(self) -> np.ndarray:
        """The log-variance of `q(x_t | x0)`."""
        return np.log(1.0 - self.alphas_cumprod)

    @_derived
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        """The weight of x_t in x0 (Ho et al., eq. 15); inf where alphas_cumprod is 0."""
        return np.sqrt(1.0 / self.alphas_cumprod)

    @_derived
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        """Minus the weight of epsilon in x0 (Ho et al., eq. 15); inf where alphas_cumprod is 0."""
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @_derived
    def posterior_variance(self) -> np.ndarray:
        """The variance of `q(x_{t-1} | x_t, x0)` (Ho et al., eq. 7); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @_derived
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """`log(posterior_variance)`, whose value at 0 is that at 1, as in OpenAI's code and Ho's second.

        A variance of 0 elsewhere (T = 1, or a beta of 0) counts as 1e-20, so that the log is finite.
        """
        variance = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        return np.log(np.maximum(variance if self.T > 1 else self.posterior_variance, 1e-20))

    @_derived
    def posterior_mean_coef1(self) -> np.ndarray:
        """The weight of x0 in the mean of `q(x_{t-1} | x_t, x0)` (Ho et al., eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @_derived
    def posterior_mean_coef2(self) -> np.ndarray:
        """The weight of x_t in the mean of `q(x_{t-1} | x_t, x0)` (Ho et al., eq. 7)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(self.alphas) / (1.0 - self.alphas_cumprod)

    @_derived
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio `ab / (1 - ab)` (Kingma et al. 2021, arXiv 2107.00630, eq. 2)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def tensor(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The table of `q_sample`, shape (T, 2): columns sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod.

        Computed in float64, rounded to `dtype` (None: float32) and kept per (device, dtype): every caller
        gets the same tensor, so none may write to it. The first call copies to the device: make it before a
        CUDA graph is captured.

        Raises:
            TypeError: dtype is not a floating type.
        """
        import torch

        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        table = np.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], axis=1)
        return cached_tensor(self._tensors, table, device, dtype)

    @cached_property
    def _tensors(self) -> dict[Any, torch.Tensor]:
        return {}

    def __len__(self) -> int:
        return self.T

    def __repr__(self) -> str:
        ab = self.alphas_cumprod
        return f"Schedule(T={self.T}, alphas_cumprod={ab[0]:.6g}..{ab[-1]:.6g})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Schedule, (
            self.betas,
            self.alphas_cumprod,
        )  # read-only again there, and no device tensors travel


def _sigmoid(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))  # never overflows, and keeps its digits where the sigmoid is small
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def _capped_betas(ab: np.ndarray, max_beta: Any) -> np.ndarray:
    """The T betas between T + 1 values of alphas_cumprod that begin at u = 0, each at most `max_beta`."""
    max_beta = check_number("max_beta", max_beta, lambda beta: 0 < beta <= 1, "in (0, 1]")
    return np.minimum(1.0 - ab[1:] / ab[:-1], max_beta)
