"""What a run is drawn towards: its class labels, further than the model goes, or a classifier's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedule import Schedule
from .steps import StepTable
from .unet import UNet

CondFn = Callable[[Tensor, Tensor], Tensor]


# Labels, and guidance without a classifier


def as_labels(
    model: Any, class_labels: Tensor | None, batch: int, device: torch.device, name: str = "class_labels"
) -> Tensor | None:
    """The labels on the device; for our U-Net, of the classes that it has."""
    classes = model.config.num_class_embeds if isinstance(model, UNet) else None
    if class_labels is None:
        if classes is not None:
            raise ValueError(f"the model needs {name}, in [0, {classes - 1}]")
        return None
    if isinstance(model, UNet) and classes is None:
        raise ValueError(f"the model has no classes and takes no {name}")
    if not isinstance(class_labels, Tensor) or (classes is not None and class_labels.dtype != torch.int64):
        given = class_labels.dtype if isinstance(class_labels, Tensor) else type(class_labels).__name__
        raise TypeError(f"{name} must be an int64 Tensor, got {given}")
    shape = tuple(class_labels.shape)
    if shape[:1] != (batch,) or (classes is not None and len(shape) > 1):
        raise ValueError(f"{name} must have shape ({batch},), one an image, got {shape}")
    if classes is not None:
        low, high = (int(label) for label in class_labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must be in [0, {classes - 1}], got {low if low < 0 else high}")
    return class_labels.detach().to(device, copy=True).contiguous()


def as_pair(
    model: Any, labels: Tensor | None, scale: float | Tensor | None, null_label: int | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Labels (2B, ...), each image's own and then those of no class, and the scale (B,) float32.

    The labels as they are, and None, without a scale or with 1, which is the model's own prediction.
    """
    if scale is None:
        if null_label is not None:
            raise ValueError("null_label is of guidance_scale, which is not given")
        return labels, None
    if labels is None:
        raise ValueError("guidance_scale needs class_labels")
    scale = _as_scale(scale, labels)
    if scale.device.type == "cpu" and bool((scale == 1).all()):
        return labels, None
    null = _as_null(null_label, labels)
    null = as_labels(model, null, len(labels), labels.device, "null_label")
    return torch.cat([labels, null]), scale.to(labels.device, copy=True)


def combine(out: Tensor, scale: Tensor, channels: int) -> Tensor:
    """``uncond + scale (cond - uncond)`` of an ``out`` (2B, ...) of both, in float32, (B, ...).

    What comes after the channels of x, a learned variance, is the conditional half's (as in GLIDE, Nichol et
    al. 2021, arXiv 2112.10741).
    """
    if len(out) != 2 * len(scale):
        raise ValueError(f"out must have {2 * len(scale)} entries, with labels and without; got {len(out)}")
    cond, uncond = out.float().chunk(2)
    weight = scale.reshape(-1, *[1] * (out.dim() - 1))
    guided = torch.addcmul(uncond[:, :channels], weight, cond[:, :channels] - uncond[:, :channels])
    return guided if out.shape[1] == channels else torch.cat([guided, cond[:, channels:]], dim=1)


def _as_scale(scale: float | Tensor, labels: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.shape != labels.shape[:1]:
            raise ValueError(
                f"guidance_scale must be a number, or floating ({len(labels)},), one an image; "
                f"got {tuple(scale.shape)} {scale.dtype}"
            )
        return scale.detach().float()
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale must be a number or a Tensor, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    return torch.full(labels.shape[:1], float(scale))


def _as_null(null_label: int | Tensor | None, labels: Tensor) -> Tensor:
    if null_label is None:
        raise ValueError("guidance_scale needs null_label: what the model is told where there is no class")
    if isinstance(null_label, int) and not isinstance(null_label, bool) and not labels.is_floating_point():
        return torch.full_like(labels, null_label)
    if not isinstance(null_label, Tensor) or null_label.dtype != labels.dtype:
        given = null_label.dtype if isinstance(null_label, Tensor) else type(null_label).__name__
        allowed = f"a Tensor of {labels.dtype}, as class_labels are"
        allowed += "" if labels.is_floating_point() else ", or an int"
        raise TypeError(f"null_label must be {allowed}; got {given}")
    if null_label.shape not in (labels.shape, labels.shape[1:]):
        raise ValueError(
            f"null_label must have shape {tuple(labels.shape[1:])} or {tuple(labels.shape)}, "
            f"got {tuple(null_label.shape)}"
        )
    return null_label.expand(labels.shape)


# Guidance by a classifier


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier's gradient in each step (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithms 1 and 2).

    Attributes:
        cond_fn: ``cond_fn(x, t) -> gradient`` of ``log p(y | x)``, scaled as one likes; like x.
        out_from_gradient: float32 (N,): DDIM's ``epsilon - sqrt(1 - ab) gradient``, as a change of ``out``.
        x_from_gradient: float32 (N,): DDPM's variance, which weighs the gradient in the mean.
        logs: float32 (N, 2), the bounds of the log variance where that is learned, else None.
    """

    cond_fn: CondFn
    out_from_gradient: Tensor | None
    x_from_gradient: Tensor | None
    logs: Tensor | None

    @classmethod
    def of(
        cls, cond_fn: Any, table: StepTable, schedule: Schedule | None, device: torch.device
    ) -> Classifier:
        """Raises TypeError, ValueError: not callable; a table that is not DDPM's or a schedule's DDIM."""
        if not callable(cond_fn):
            raise TypeError(f"cond_fn must be callable as cond_fn(x, t), got {type(cond_fn).__name__}")

        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32, device=device)

        if table.method == "ddpm":
            logs = tensor(table.rows[:, -2:]) if table.learned_range else None
            return cls(cond_fn, None, tensor(table.column("x_from_noise") ** 2), logs)
        if table.method != "ddim":
            raise ValueError(f"cond_fn is for the methods ddpm and ddim, not {table.method!r}")
        if schedule is None:
            raise ValueError("cond_fn with ddim needs a Schedule: a StepTable does not say its noise levels")
        ab = schedule.alphas_cumprod[table.timesteps]
        if not ab.all():
            raise ValueError(f"cond_fn with ddim: alphas_cumprod is 0 at t = {table.timesteps[ab == 0][0]}")
        # epsilon - sqrt(1 - ab) g is x0 + (1 - ab) / sqrt(ab) g, whatever the network predicts.
        return cls(cond_fn, tensor((1 - ab) / np.sqrt(ab) / table.column("x0_from_out")), None, None)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # a caller's mode would refuse a gradient
            gradient = self.cond_fn(x.clone(), t.clone())  # which autograd may save, and cond_fn may change
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape or not gradient.is_floating_point():
            given = type(gradient).__name__
            if isinstance(gradient, Tensor):
                given = f"{tuple(gradient.shape)} {gradient.dtype}"
            raise ValueError(f"cond_fn must return a floating {tuple(x.shape)}, like x; got {given}")
        return gradient.detach().to(x.dtype)

    def before(self, out: Tensor, gradient: Tensor, i: Tensor) -> Tensor:
        """The network's ``out`` as the step is to see it."""
        if self.out_from_gradient is None:
            return out
        channels = gradient.shape[1]
        weight = self.out_from_gradient.index_select(0, i.reshape(1)).reshape([1] * out.dim())
        shifted = out[:, :channels] + weight * gradient
        return shifted if out.shape[1] == channels else torch.cat([shifted, out[:, channels:]], dim=1)

    def after(self, x: Tensor, out: Tensor, gradient: Tensor, i: Tensor) -> None:
        """Move the step's x on by the variance times the gradient."""
        if self.x_from_gradient is None:
            return
        i, ones = i.reshape(1), [1] * x.dim()
        if self.logs is not None:
            low, high = (each.reshape(ones) for each in self.logs.index_select(0, i).unbind(-1))
            fraction = (out[:, x.shape[1] :].float() + 1) / 2
            gradient = gradient * (fraction * high + (1 - fraction) * low).exp()
        x.add_(self.x_from_gradient.index_select(0, i).reshape(ones) * gradient)
