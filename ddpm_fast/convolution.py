"""The U-Net's convolution: `nn.Conv2d`, with its weight laid out once for the processor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PACKS: bool = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, op) for op in ("_convolution_pointwise", "_reorder_convolution_weight")
)
"""Whether this torch has the two oneDNN ops that its own compiler uses for frozen weights."""
DTYPES = (torch.float32, torch.bfloat16)


class _Packed(NamedTuple):
    key: tuple
    weight: Tensor  # opaque: only oneDNN reads it


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` (one group, padded with zeros) that may add another tensor to its result.

    On the CPU torch lays a weight out for oneDNN anew at every call, which for one image costs up to three
    quarters of the convolution itself. Where nothing is differentiated and x is channels_last float32 or
    bfloat16, this layer does it once for a shape of x and a weight as it is (a change in place shows). The
    copy is as large as the weight, and no part of the state dict, of copies or of pickles. Elsewhere, with
    autocast or ``torch.compile`` for instance, it is ``nn.Conv2d``.
    """

    _packed: _Packed | None = None

    def forward(self, x: Tensor, plus: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), and ``plus``, of the result's shape, added to it.

        ``bias`` (C_out,) stands for the layer's own.
        """
        bias = self.bias if bias is None else bias
        if not self._packable(x):
            result = self._conv_forward(x, self.weight, bias)
            return result if plus is None else plus + result
        weight = self._pack(x)
        window = (self.padding, self.stride, self.dilation, 1)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if plus is not None and plus.is_contiguous(memory_format=torch.channels_last):
            return convolve.binary(x, plus, weight, bias, *window, "add", None, None, [], None)
        result = convolve.default(x, weight, bias, *window, "none", [], "")
        return result if plus is None else plus + result

    def _packable(self, x: Tensor) -> bool:
        return (
            PACKS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and type(x) is Tensor
            and x.device.type == "cpu"
            and x.dtype in DTYPES
            and x.dtype == self.weight.dtype
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and not self.weight.is_inference()  # whose changes could not be seen
        )

    def _pack(self, x: Tensor) -> Tensor:
        weight = self.weight
        key = (x.shape, x.dtype, weight.data_ptr(), weight._version)
        if self._packed is None or self._packed.key != key:
            self._packed = None  # free the old one first
            window = (self.padding, self.stride, self.dilation, 1)
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *window, list(x.shape))
            self._packed = _Packed(key, packed)
        return self._packed.weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
