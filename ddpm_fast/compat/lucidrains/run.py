"""How a loop of `GaussianDiffusion` is run: in `Sampler`, or step by step as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...noise import TorchNoise, default_generator
from ...sampler import Sampler
from ...steps import StepTable
from ...unet import UNet
from . import tables

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

REPLACEABLE = (
    "p_sample",
    "p_mean_variance",
    "q_posterior",
    "model_predictions",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)
"""The methods that a step is made of."""


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        steps: what ``take`` is to be told of each step.
        take: ``take(img, step, x_self_cond) -> (img, x0)``, the step as it is written.
        table: the same steps as numbers.
    """

    steps: Sequence[Any]
    take: Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Tensor]]
    table: StepTable


def denoise(
    diffusion: GaussianDiffusion, img: Tensor, run: Run, desc: str, kept: list[Tensor] | None = None
) -> Tensor:
    """`img` after all steps; each one's is appended to `kept`. A bar that is named `desc` shows them."""
    # Where x0 is the output as it is, the first step tells what layout x takes from it.
    written = max(tables.loud(run.table), diffusion.objective == "pred_x0")
    if written_steps_are_due(diffusion, img):
        written = len(run.steps)
    x_start, taken = None, 0
    with tqdm(total=len(run.steps), desc=desc) as bar:
        for step in run.steps:
            if taken >= written and img.is_contiguous():  # else randn_like draws in another order
                break
            img, x_start = run.take(img, step, x_start if diffusion.self_condition else None)
            taken += 1
            if kept is not None:
                kept.append(img)
            bar.update()
        else:
            return img

        def counted(steps: Iterable[int]) -> Iterator[int]:
            for i in steps:
                yield i
                bar.update()

        return _sampler(diffusion).with_table(tables.last(run.table, len(run.steps) - taken))(
            x_T=img,
            noise=TorchNoise(default_generator(img.device), torch.float32),
            progress=counted,
            callback=None if kept is None else lambda i, t, x, x0: kept.append(x.clone()),
        )


def written_steps_are_due(diffusion: GaussianDiffusion, img: Tensor) -> bool:
    """Whether a step is more than a call of the network and a row of float32 numbers."""
    model = diffusion.model
    tensors = [img, *model.parameters(), *diffusion.buffers(recurse=False)]
    return (
        diffusion.self_condition
        or any(_is_replaced(diffusion, name) for name in REPLACEABLE)
        or any(tensor.dtype != torch.float32 for tensor in tensors)
        or torch.get_default_dtype() != torch.float32
        or img.device.type not in ("cpu", "cuda")
        or torch.is_autocast_enabled(img.device.type)
        or _minds_training_mode(model)
    )


def _is_replaced(diffusion: GaussianDiffusion, name: str) -> bool:
    own = next(vars(cls)[name] for cls in type(diffusion).__mro__ if name in vars(cls))
    return name in vars(diffusion) or getattr(own, "__module__", None) != f"{__package__}.gaussian_diffusion"


def _minds_training_mode(model: nn.Module) -> bool:
    """Whether the network may not be put into eval mode for a run, as `Sampler` does, without a trace.

    Of their Unet and of ours dropout is all that would tell; of another network one cannot know.
    """
    if not any(part.training for part in model.modules()):
        return False
    package, _, _ = type(model).__module__.partition(".")
    known = isinstance(model, UNet) or (
        package == "denoising_diffusion_pytorch" and type(model).__name__ == "Unet"
    )
    return not known or any(getattr(part, "p", 0) for part in model.modules())


class _Network(nn.Module):
    """The model as `Sampler` calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, None)


def _sampler(diffusion: GaussianDiffusion) -> Sampler:
    """The diffusion's sampler, kept for its captured steps: `with_table` shares them."""
    model, (sampled, sampler) = diffusion.model, diffusion._sampler
    if sampled is not model:
        table = tables.ddpm(diffusion._levels(), diffusion.objective)
        sampler = Sampler(model if isinstance(model, UNet) else _Network(model), table)
        diffusion._sampler = model, sampler
    return sampler
