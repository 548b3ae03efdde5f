"""Terms of the variational bound, under guided-diffusion's names."""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses import log_likelihood
from ...losses import normal_cdf as approx_standard_normal_cdf

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, each element; the arguments broadcast.

    Raises:
        AssertionError: none of the four is a Tensor.
    """
    tensor = next((given for given in (mean1, logvar1, mean2, logvar2) if isinstance(given, Tensor)), None)
    assert tensor is not None, "at least one argument must be a Tensor"
    logvar1, logvar2 = (
        given if isinstance(given, Tensor) else torch.full((), given).to(tensor)
        for given in (logvar1, logvar2)
    )
    apart = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 + torch.exp(logvar1 - logvar2) - 1.0 + apart)


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p(x) in nats of 8-bit images in [-1, 1], each element, like x.

    A Gaussian integrated over each level: Ho et al. 2020 (arXiv 2006.11239), eq. 13.

    Raises:
        AssertionError: the three do not have one shape.
    """
    assert x.shape == means.shape == log_scales.shape, (
        f"x, means and log_scales must have one shape, got {tuple(x.shape)}, {tuple(means.shape)} and "
        f"{tuple(log_scales.shape)}"
    )
    return log_likelihood(x, x - means, 2 * log_scales)
