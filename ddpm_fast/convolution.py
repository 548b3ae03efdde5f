"""The U-Net's convolutions and linear layers, with their weights laid out once for the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, tuning
from .ops._dispatch import cpu_kernels, is_transformed, runs_native

Own = ops.PackedConv3x3 | ops.PackedLinear


class Packed(NamedTuple):
    key: tuple
    weight: Tensor | Own  # opaque: oneDNN reads it, or our own kernels


class Kernel(NamedTuple):
    """Which one of `ops.conv3x3_packed`."""

    algorithm: str
    resize: str | None
    padding: tuple[int, int]


class Kept(NamedTuple):
    made_for: str | Kernel
    shape: torch.Size
    fingerprint: int  # of the values that were packed
    packed: Own


Packs = dict[nn.Module, Packed]

_FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "pad": lambda x: F.pad(x, (0, 1, 0, 1)),
}
"""What `Conv2d` may do to x before it convolves."""

_OWN_WINDOWS = {
    ((3, 3), (1, 1), (1, 1), (1, 1), None): (None, (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1), "repeat"): ("up", (1, 1)),
    ((3, 3), (1, 1), (2, 2), (1, 1), None): ("down", (1, 1)),
    ((3, 3), (1, 1), (2, 2), (0, 0), "pad"): ("down", (0, 1)),
}
"""By kernel size, dilation, stride, padding, and what comes first: our own kernels' resize and padding."""

_PACKS: ContextVar[Packs | None] = ContextVar("packs", default=None)
_LOW_MEMORY: ContextVar[bool] = ContextVar("low_memory", default=False)
_TRIED: ContextVar[str | None] = ContextVar("tried", default=None)

_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
"""Our own packed weights outlive a run: to make them again takes longer, most of it for fresh memory, than
the first steps of the next run save by them. A run that finds one here looks at every value of the weight."""


@contextmanager
def packing(packs: Packs, low_memory: bool = False) -> Iterator[None]:
    """Within, each `Conv2d` keeps its laid-out weight in ``packs``: for one run, whose weights do not change.

    oneDNN's copies are as large as the weights, and gone with ``packs``. Ours are up to four times as large,
    of bfloat16 without AMX eight times; they are kept as long as their module, for the next run that finds
    the weight as it was. With ``low_memory`` there are none.
    """
    token, low = _PACKS.set(packs), _LOW_MEMORY.set(low_memory)
    try:
        yield
    finally:
        _LOW_MEMORY.reset(low)
        _PACKS.reset(token)


def packed_bytes(packs: Packs) -> int:
    """What the weights that a run has laid out take, beside those of the model."""
    weights = (packed.weight for packed in packs.values())
    tensors = (weight if isinstance(weight, Tensor) else weight.weight for weight in weights)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether there are the oneDNN ops that torch's own compiler uses for frozen weights, in that dtype."""
    onednn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(onednn, "_reorder_convolution_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported())


def has_amx() -> bool:
    return cpu_kernels().startswith("amx")


ONEDNN = "oneDNN"
PIXELS_A_THREAD = 1024
"""With more of them the order of algorithms stays as it is, and a measurement would take longer."""


def allowed_conv3x3(dtype: torch.dtype, resize: str | None = None) -> tuple[str, ...]:
    """What may be faster than the table says: a whole float32 U-Net has to stay within 5e-6 of float64.

    On AMX F(4x4) would be the one that errs most. In bfloat16 none errs more than direct convolution.
    """
    if resize is not None:
        return ("f2", ONEDNN) if resize == "up" else ("direct", "f2", ONEDNN)
    if has_amx():
        return ("direct", ONEDNN) if dtype == torch.bfloat16 else ("direct", "f2", "f4x2", ONEDNN)
    return ("direct", "f2", "f4x2", "f4", ONEDNN)


def measured_batch(batch: int, height: int, width: int) -> int:
    """The batch that is measured for this one: a power of two, so that a stream's many sizes are few."""
    batch = 2 ** (batch - 1).bit_length()
    while batch > 1 and batch * height * width > PIXELS_A_THREAD * torch.get_num_threads():
        batch //= 2
    return batch


def fastest_conv3x3(batch: int, in_channels: int, height: int, width: int) -> str | None:
    """The fastest algorithm of `ops.conv3x3` with a packed weight, None where oneDNN is faster still.

    So it was on one machine; `tuning.fastest` begins with it, and it stands where nothing is measured.

    A weight is read from beyond the caches for every 48 tiles of outputs, 36, 24, 16 or 9 numbers for each
    pair of channels: with few tiles that takes longer than the products, and the larger tile loses. Times
    faster than oneDNN, one thread, AVX-512, 256 channels (128 at 32x32), the network's layers in order:

    ======  ====  ====  ====  ====  ======
    batch   side  f4    f4x2  f2    direct
    ======  ====  ====  ====  ====  ======
    1       32    2.3   2.1   1.8   0.9
    1       16    2.0   2.0   1.7   0.9     f4x2 takes 2/3 of f4's memory and errs 0.6 times as much
    1       8     0.9   1.2   1.6   1.0
    1       4     0.5   0.8   1.0   1.3
    8       32    2.7   2.3   1.8   0.9
    8       16    2.3   2.1   1.8   0.9
    8       8     2.3   2.0   1.8   0.9
    8       4     1.4   2.0   2.2   1.2
    ======  ====  ====  ====  ====  ======

    On AMX products cost a quarter of that, and the weights' way from memory counts for more: F(4x4) is ahead
    of F(2x2), if at all, by a tenth, with 2.3 times its memory and 2.5 times its error.

    ======  ====  ====  ====  ====  ======
    batch   side  f4    f4x2  f2    direct
    ======  ====  ====  ====  ====  ======
    1       32    2.9   3.1   2.9   1.7
    1       16    2.4   2.6   2.6   1.7
    1       8     1.0   1.3   1.8   1.7
    1       4     0.6   0.8   1.1   1.5
    8       32    3.6   3.6   3.2   1.7
    8       16    3.5   3.3   3.5   1.9
    8       8     2.8   3.0   3.1   1.7
    8       4     1.6   2.5   2.8   1.8
    ======  ====  ====  ====  ====  ======

    Of 3 input channels' 16 lanes most are empty: to 128 channels at 32x32 F(4x4) is 1.4 times as fast as
    oneDNN for one image, 0.9 for eight, and errs by four times as much, F(2x2) 1.0 and 0.6 times as fast.
    """
    if in_channels < 16:
        return None
    if not has_amx():
        if tiles(batch, height, width, 4, 4) >= 32:
            return "f4"
        if tiles(batch, height, width, 4, 2) >= 32:
            return "f4x2"
    return "f2" if tiles(batch, height, width, 2, 2) >= 16 else "direct"


def fastest_resizing(resize: str, batch: int, in_channels: int, height: int, width: int) -> str | None:
    """As `fastest_conv3x3`, of `ops.conv3x3_packed` with ``resize``; height and width are of x.

    "up" has one algorithm. Times faster than oneDNN, on the enlarged image or with its stride of 2, one
    thread, 256 channels (128 at 32x32):

    ======  ====  ===========  ============  ========  =======  ============  ========
    batch   side  AVX-512: up  down, direct  down, f2  AMX: up  down, direct  down, f2
    ======  ====  ===========  ============  ========  =======  ============  ========
    1       32                 0.9           1.2                1.7           2.0
    1       16    3.3          1.0           1.2       7.3      1.9           1.8
    1       8     3.1          1.5           0.9       6.3      1.6           1.0
    1       4     3.2                                  3.7
    8       32                 0.9           1.1                1.5           2.1
    8       16    3.3          0.9           1.1       7.3      1.9           2.4
    8       8     3.3          1.3           1.5       7.5      2.3           3.0
    8       4     3.3                                  7.0
    ======  ====  ===========  ============  ========  =======  ============  ========
    """
    if in_channels < 16:
        return None
    if resize == "up":
        return "f2"
    few = 32 if has_amx() else 16
    return "f2" if tiles(batch, height // 2, width // 2, 2, 2) >= few else "direct"


def fastest_bfloat16(batch: int, in_channels: int, height: int, width: int) -> str | None:
    """As `fastest_conv3x3`, in bfloat16.

    On AMX products cost so little that direct convolution is ahead of all transforms. Elsewhere F(4x4) in
    float32 is ahead of oneDNN's products of bfloat16, which smaller tiles may not be.
    """
    if has_amx():
        return "direct" if in_channels >= 32 else None
    algorithm = fastest_conv3x3(batch, in_channels, height, width)
    return algorithm if algorithm in ("f4", "f4x2") else None


def tiles(batch: int, height: int, width: int, down: int, across: int) -> int:
    """Of down x across outputs, in which a batch of images is taken."""
    return batch * -(-height // down) * -(-width // across)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` (one group, padded with zeros) that may add another tensor to its result.

    On the CPU torch lays a weight out for oneDNN anew at every call, which for one image costs up to three
    quarters of the convolution itself. Within `packing`, where x is channels_last float32 or bfloat16, this
    layer does it once for a shape of x; and a 3x3 window of stride 1, in float32 of stride 2 too, is our own
    kernels', where they are faster. Elsewhere it is ``nn.Conv2d``.
    """

    def forward(
        self,
        x: Tensor,
        plus: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        first: str | None = None,
        norm: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), and ``plus``, of the result's shape, added to it.

        ``bias`` (C_out,) stands for the layer's own. ``first`` is done to x before: "repeat", every pixel
        four times, or "pad", zeros below and on the right. Our own kernels make no such tensor. ``norm`` and
        ``skip`` are `ops.conv3x3_packed`'s, for an x that this layer `normalises`.
        """
        bias = self.bias if bias is None else bias
        packs = _packs()
        packable = packs is not None and self._packable(x)
        kernel = self._kernel(x, first) if packable else None
        if kernel is None and first is not None:
            x = _FIRST[first](x)
            kernel = self._kernel(x, None) if packable and self._packable(x) else None
        if kernel is not None:
            weight = self._pack_own(packs, kernel)
            padding = kernel.padding
            return ops.conv3x3_packed(x, weight, bias, plus=plus, padding=padding, norm=norm, skip=skip)
        if not packable:
            if self._learns(x):
                return ops.conv3x3(x, self.weight, bias, plus=plus, algorithm="f4")
            result = self._conv_forward(x, self.weight, bias)
            return result if plus is None else plus + result
        window = (self.padding, self.stride, self.dilation, 1)
        weight = self._pack(x, packs, window)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if plus is not None and plus.is_contiguous(memory_format=torch.channels_last):
            return convolve.binary(x, plus, weight, bias, *window, "add", None, None, [], None)
        result = convolve.default(x, weight, bias, *window, "none", [], "")
        return result if plus is None else plus + result

    def normalises(self, x: Tensor) -> bool:
        """Whether a norm and its SiLU before this layer are best left to it: our own kernels will run."""
        return _packs() is not None and self._packable(x) and self._kernel(x, None) is not None

    def _packable(self, x: Tensor) -> bool:
        return (
            _is_frozen(self.weight, x)
            and x.is_contiguous(memory_format=torch.channels_last)
            and torch.backends.mkldnn.enabled
            and can_pack(x.dtype)
        )

    def _learns(self, x: Tensor) -> bool:
        """Whether our own kernels are the faster, forward and backward, with a weight packed for each.

        From 32 tiles on they are: 1.4 times for 256 channels, where that packing takes half of the time, and
        1.8 to 2.4 for fewer or with more tiles (one thread, beside oneDNN forward and backward).
        """
        return (
            torch.is_grad_enabled()
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not is_transformed()
            and _suits(self.weight, x)
            and x.is_contiguous(memory_format=torch.channels_last)
            and self._window(x, None) == (None, (1, 1))
            and min(self.in_channels, self.out_channels) >= 16
            and tiles(len(x), *x.shape[2:], 4, 4) >= 32
        )

    def _kernel(self, x: Tensor, first: str | None) -> Kernel | None:
        """Which of our own kernels, None for oneDNN's."""
        window = None if _LOW_MEMORY.get() else self._window(x, first)
        if window is None:
            return None
        resize, padding = window
        batch, _, height, width = x.shape
        if self.in_channels == 1 or (resize is not None and height * width == 1):
            return None  # such an x is contiguous too, and so would the result be
        if resize is not None and x.dtype == torch.bfloat16:
            return None
        shape = batch, self.in_channels, height, width
        if resize is not None:
            prior = fastest_resizing(resize, *shape)
        else:
            prior = (fastest_bfloat16 if x.dtype == torch.bfloat16 else fastest_conv3x3)(*shape)
        algorithm = self._fastest(x, prior, resize, first)
        return None if algorithm is None else Kernel(algorithm, resize, padding)

    def _fastest(self, x: Tensor, prior: str | None, resize: str | None, first: str | None) -> str | None:
        """``prior``, or what is faster on this processor."""
        name = _TRIED.get()
        if name is None:
            batch, _, height, width = x.shape
            shape = measured_batch(batch, height, width), self.in_channels, height, width
            of = "conv3x3", resize or "", first or "", x.dtype, *shape, self.out_channels
            make = partial(self._timed, shape, first)
            name = tuning.fastest(of, allowed_conv3x3(x.dtype, resize), prior or ONEDNN, make)
        return None if name == ONEDNN else name

    def _timed(self, shape: tuple[int, int, int, int], first: str | None, name: str) -> tuning.Call:
        """This layer by one algorithm, on an x of that shape."""
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=noise, dtype=self.weight.dtype, device="cpu")
        x = x.contiguous(memory_format=torch.channels_last)
        packs: Packs = {}

        def run() -> None:
            tried = _TRIED.set(name)
            try:
                with packing(packs):
                    Conv2d.forward(self, x, first=first)  # whatever stands for it in this layer sees nothing
            finally:
                _TRIED.reset(tried)

        run()
        weight = packs[self].weight
        return tuning.Call(run, weight if isinstance(weight, Tensor) else weight.weight)

    def _window(self, x: Tensor, first: str | None) -> tuple[str | None, tuple[int, int]] | None:
        """Our own kernels' resize and padding for this layer after ``first``, None where they have none."""
        window = (self.kernel_size, self.dilation, self.stride, self.padding, first)
        return _OWN_WINDOWS.get(window) if runs_native("conv3x3", x) else None

    def _pack_own(self, packs: Packs, kernel: Kernel) -> ops.PackedConv3x3:
        def pack() -> Own:
            return ops.pack_conv3x3(self.weight, kernel.algorithm, kernel.resize)

        tried = _TRIED.get() is not None  # then for a measurement, and not for a run
        return _laid_out(self, packs, kernel, pack if tried else lambda: _keep(self, kernel, pack))

    def _pack(self, x: Tensor, packs: Packs, window: tuple) -> Tensor:
        def pack() -> Tensor:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            return reorder(self.weight.detach(), *window, list(x.shape))

        return _laid_out(self, packs, x.shape, pack)  # on which oneDNN's layout depends


class Linear(nn.Linear):
    """``nn.Linear`` that may add another tensor to its result, in its own kernel where that is the faster."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(..., C_in) -> (..., C_out), and ``plus``, of the result's shape, added to it."""
        result = own_linear(self, x, self.bias, plus)
        if result is None:
            result = super().forward(x)
            return result if plus is None else plus + result
        return result


def own_linear(
    layer: nn.Linear | nn.Conv2d,
    x: Tensor,
    bias: Tensor | None,
    plus: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    norm: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """A linear layer, or a 1x1 convolution, of rows (..., C_in) by `ops.linear_packed`, and ``plus`` added.

    ``skip`` is that op's, and ``norm`` makes what it takes for one.

    None where that is not for it: outside `packing` or with its ``low_memory``; and where BLAS is as fast,
    which is everywhere but on AMX, and there below 16 rows, whose time is the weight's way from memory.
    """
    packs = _packs()
    if packs is None or _LOW_MEMORY.get() or not has_amx():
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or x.numel() < 16 * x.shape[-1]:
        return None
    if layer.weight.shape[1] < 64:
        return None
    if not _is_frozen(layer.weight, x) or not runs_native("linear", x):
        return None

    def pack() -> Own:
        return _keep(layer, "linear", lambda: ops.pack_linear(layer.weight.flatten(1)))

    packed = _laid_out(layer, packs, "linear", pack)
    fold = None if norm is None else norm()
    return ops.linear_packed(x, packed, bias, plus=plus, skip=skip, norm=fold)


def _packs() -> Packs | None:
    return None if torch.compiler.is_compiling() else _PACKS.get()


def _is_frozen(weight: Tensor, x: Tensor) -> bool:
    """Whether the weight may be laid out once for calls like this one."""
    return (
        not torch.is_grad_enabled()
        and type(weight) is nn.Parameter  # one that is computed anew at each call has no version
        and not weight.is_inference()
        and _suits(weight, x)
    )


def _suits(weight: Tensor, x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
    )


def _laid_out(
    layer: nn.Module, packs: Packs, made_for: str | Kernel | torch.Size, pack: Callable[[], Tensor | Own]
) -> Tensor | Own:
    """What the run has packed of a layer, packed anew where its weight has changed, or what it is for."""
    weight = layer.weight
    key = (made_for, weight.dtype, weight.data_ptr(), weight._version)
    packed = packs.get(layer)
    if packed is None or packed.key != key:
        packs.pop(layer, None)  # free the old one first
        packed = packs[layer] = Packed(key, pack())
    return packed.weight


def _keep(layer: nn.Module, made_for: str | Kernel, pack: Callable[[], Own]) -> Own:
    """What an earlier run has packed of the same values, see `_KEPT`, or packed now."""
    now = made_for, layer.weight.shape, ops.fingerprint(layer.weight)
    kept = _KEPT.get(layer)
    if kept is None or kept[:3] != now:
        _KEPT.pop(layer, None)
        kept = _KEPT[layer] = Kept(*now, pack())
    return kept.packed
