"""A whole run in `Sampler`, where that does just what the loop over its steps does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...noise import TorchNoise, default_generator
from ...sampler import Sampler
from ...steps import StepTable
from ...unet import UNet

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

HALVES = (torch.bfloat16, torch.float16)


def sample(
    diffusion: GaussianDiffusion,
    kind: str,
    model: Callable[..., Any],
    x: Tensor,
    progress: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """The images that begin with x, float32; None where the loop is to run: see `_is_plain`.

    A model with a method ``as_ddpm_fast`` runs as the module that it returns, ``model(x, t[, class_labels])``
    on the same weights, unless that is None or there are other ``model_kwargs`` than y.

    Args:
        kind: "ddpm" or "ddim", see `tables.rows`.
        options: of a step, by name.
    """
    if not _is_plain(model, x):
        return None
    kwargs = options["model_kwargs"] or {}
    rows = diffusion._rows(kind, options.get("eta", 0.0))[::-1]
    times, labels = np.arange(len(rows)), None
    network = None
    if diffusion._is_ours("_wrap_model"):
        network = _own_network(model, kwargs, len(x), x.shape[1] * (2 if diffusion._learned else 1))
    if network is None:
        network = _called(model, lambda x, t: diffusion._evaluate(model, x, t, kwargs)[1])
    else:
        labels = kwargs.get("y")
        labels = labels if labels is None else labels.long()
        t = torch.arange(len(rows), device=x.device)
        told = diffusion._wrap_model(lambda _, t: t)(x, diffusion._scale_timesteps(t))
        if torch.equal(told, told.long()):
            times = told.long().cpu().numpy()
        else:
            own = network
            network = _called(own, lambda x, t, *labels: own(x, told[t], *labels))
    table = StepTable(kind, times[::-1], rows, np.ones(len(rows), dtype=np.bool_))
    sampler = Sampler(network, table, clip=1.0 if options["clip_denoised"] else None)
    noise = TorchNoise(default_generator(x.device), torch.float32)
    return sampler(x_T=x, noise=noise, class_labels=labels, progress=tqdm if progress else False)


def _is_plain(model: Callable[..., Any], x: Tensor) -> bool:
    """Whether `Sampler` changes nothing: its state is float32, it has a model in eval mode, where the model's
    weights are, and gives it x in the dtype of its first weight if that is a half."""
    if x.dtype != torch.float32 or x.dim() < 2 or x.device.type not in ("cpu", "cuda"):
        return False
    if not isinstance(model, nn.Module):
        return True
    first = next(model.parameters(), None)
    placed = first is None or (first.device == x.device and first.dtype not in HALVES)
    return placed and not any(part.training for part in model.modules())


def _own_network(
    model: Callable[..., Any], kwargs: dict[str, Any], batch: int, channels: int
) -> nn.Module | None:
    """Ours on the model's weights, if there is one; what does not fit is for the model itself to refuse."""
    convert = getattr(model, "as_ddpm_fast", None)
    network = convert() if convert is not None and set(kwargs) <= {"y"} else None
    if not isinstance(network, UNet):
        return network
    y, has_classes = kwargs.get("y"), network.config.num_class_embeds is not None
    labels_fit = y.shape == (batch,) and has_classes if y is not None else not has_classes
    return network if labels_fit and network.config.out_channels == channels else None


def _called(model: Callable[..., Any], call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``call``, as a module with the weights of the model where it is one: by them `Sampler` knows where it
    is, and that a step may be captured."""
    return _Called(model, call) if isinstance(model, nn.Module) else call


class _Called(nn.Module):
    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        return self.call(x, t, *labels)
