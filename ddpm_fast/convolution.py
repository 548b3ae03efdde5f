"""The U-Net's convolution: `nn.Conv2d`, with its weight laid out once for the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Packed(NamedTuple):
    key: tuple
    weight: Tensor  # opaque: only oneDNN reads it


Packs = dict[nn.Module, Packed]

_PACKS: ContextVar[Packs | None] = ContextVar("packs", default=None)


@contextmanager
def packing(packs: Packs) -> Iterator[None]:
    """Within, each `Conv2d` keeps its laid-out weight in ``packs``: for one run, whose weights do not change.

    The copies are as large as the weights, and gone with ``packs``.
    """
    token = _PACKS.set(packs)
    try:
        yield
    finally:
        _PACKS.reset(token)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether there are the oneDNN ops that torch's own compiler uses for frozen weights, in that dtype."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_convolution_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` (one group, padded with zeros) that may add another tensor to its result.

    On the CPU torch lays a weight out for oneDNN anew at every call, which for one image costs up to three
    quarters of the convolution itself. Within `packing`, where x is channels_last float32 or bfloat16, this
    layer does it once for a shape of x. Elsewhere it is ``nn.Conv2d``.
    """

    def forward(self, x: Tensor, plus: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), and ``plus``, of the result's shape, added to it.

        ``bias`` (C_out,) stands for the layer's own.
        """
        bias = self.bias if bias is None else bias
        packs = _PACKS.get() if not torch.compiler.is_compiling() else None
        if packs is None or not self._packable(x):
            result = self._conv_forward(x, self.weight, bias)
            return result if plus is None else plus + result
        weight = self._pack(x, packs)
        window = (self.padding, self.stride, self.dilation, 1)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if plus is not None and plus.is_contiguous(memory_format=torch.channels_last):
            return convolve.binary(x, plus, weight, bias, *window, "add", None, None, [], None)
        result = convolve.default(x, weight, bias, *window, "none", [], "")
        return result if plus is None else plus + result

    def _packable(self, x: Tensor) -> bool:
        return (
            not torch.is_grad_enabled()
            and type(x) is Tensor
            and type(self.weight) is nn.Parameter  # one that is computed anew at each call has no version
            and not self.weight.is_inference()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.is_contiguous(memory_format=torch.channels_last)
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled("cpu")
            and can_pack(x.dtype)
        )

    def _pack(self, x: Tensor, packs: Packs) -> Tensor:
        weight = self.weight
        key = (x.shape, x.dtype, weight.data_ptr(), weight._version)
        packed = packs.get(self)
        if packed is None or packed.key != key:
            packs.pop(self, None)  # free the old one first
            window = (self.padding, self.stride, self.dilation, 1)
            laid_out = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *window, list(x.shape))
            packed = packs[self] = Packed(key, laid_out)
        return packed.weight
