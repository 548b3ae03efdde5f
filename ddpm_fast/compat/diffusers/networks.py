"""A diffusers U-Net as `Sampler` runs it: converted, on the memory of its own weights, or else as it is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import diffusers
import torch
from torch import Tensor, nn

from ... import checkpoint
from ...cuda_graph import Version, version
from ...sampler import Sampler
from ...steps import StepTable


@dataclass(frozen=True)
class Network:
    """A U-Net in a sampler, kept between runs.

    Nearly all weights are shared with the U-Net, so that a change of theirs in place, by whatever means, is
    there at once. What had to be copied (the fused q, k and v; all of it in another dtype or layout) is
    copied again before each run.

    Attributes:
        version: of the U-Net; after a change of it this network is no longer that U-Net.
        dtype: what the U-Net was asked to run in; None: its own.
        sampler: of some table.
        copies: ``(ours, theirs)``, in the order to copy.
        because: why the U-Net runs as it is; None if it was converted.
    """

    version: Version
    dtype: torch.dtype | None
    sampler: Sampler
    copies: list[tuple[Tensor, Tensor]]
    because: str | None

    @classmethod
    @torch.inference_mode(False)  # it outlives the caller's mode
    @torch.no_grad()
    def of(cls, unet: nn.Module, dtype: torch.dtype | None, table: StepTable) -> Network:
        """The network of a ``UNet2DModel``, or of a module that is called as one."""
        because, copies = _why_as_it_is(_unwrapped(unet)), []
        model: nn.Module
        try:
            if because is None:
                model, copies = checkpoint.share_diffusers(_unwrapped(unet))
        except ValueError as error:  # a config that is not converted
            because = str(error)
        if because is not None:
            model = _AsItIs(unet)
        sampler = Sampler(model, table, dtype=dtype)
        if sampler.model is not model:
            ours, theirs = (chain(each.parameters(), each.buffers()) for each in (sampler.model, model))
            copies += zip(ours, theirs, strict=True)
        return cls(version(unet), dtype, sampler, copies, because)

    def is_of(self, unet: nn.Module) -> bool:
        """Whether the U-Net has its weights where they were, and nothing else about it has changed."""
        return self.version == version(unet)

    @torch.no_grad()
    def refresh(self) -> None:
        for ours, theirs in self.copies:
            ours.copy_(theirs)


class _AsItIs(nn.Module):
    """A diffusers U-Net as ``model(x, t[, class_labels]) -> out``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, *class_labels: Tensor) -> Tensor:
        return self.unet(x, t, *class_labels).sample


def _unwrapped(unet: nn.Module) -> nn.Module:
    return getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped


def _why_as_it_is(unet: nn.Module) -> str | None:
    """Why a call does something that a conversion of config and weights would miss."""
    if getattr(type(unet), "forward", None) is not diffusers.UNet2DModel.forward:
        return f"{type(unet).__name__} is not UNet2DModel"
    with torch.device("meta"):
        made = dict(diffusers.UNet2DModel.from_config(unet.config).named_modules())
    for name, part in unet.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"{name or 'It'} has a hook or a forward of its own"
        processor = getattr(part, "processor", None)  # of an attention
        if processor is not None and type(processor).__module__ != "diffusers.models.attention_processor":
            return f"{name}.processor is {type(processor).__name__}"
        if name == "" or name not in made:  # of what is not in the config the weights do not fit
            continue
        if type(part) is not type(made[name]):
            return f"{name} is {type(part).__name__}, by the config {type(made[name]).__name__}"
        for key, value in vars(made[name]).items():
            if key.startswith("_") or key in _NO_MATTER or not isinstance(value, _PLAIN):
                continue
            if vars(part).get(key) != value:
                return f"{name}.{key} is {vars(part).get(key)!r}, by the config {value!r}"
    return None


_NO_MATTER = ("training", "gradient_checkpointing", "inplace")
"""Attributes that no picture depends on."""
_PLAIN = (bool, int, float, str, tuple, type(None))
