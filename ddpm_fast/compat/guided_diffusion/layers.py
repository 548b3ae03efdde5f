"""The blocks of guided-diffusion's U-Nets, on our ops.

Modules stand where the originals stand, also the SiLU whose work the norm before it does: what a weight is
called is where it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...convolution import Conv2d
from ...unet import GroupNorm

CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
_MEANS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class TimestepEmbedSequential(nn.Sequential):
    """Layers one after the other: the residual blocks are told the time, and the first of them the skip."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x, skip = layer(x, emb, skip), None
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Every pixel repeated, twice a side (in 3-d: within the slices), then maybe a convolution."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.factor = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Half as many pixels a side (in 3-d: within the slices), by a convolution or by their mean."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = _MEANS[dims](stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, dropout, conv, plus the input: (B, C, ...) -> (B, C_out, ...).

    With ``up`` or ``down`` the resolution changes between the first SiLU and convolution, and on the
    shortcut. With ``skip`` the input is [x, skip], and ``channels`` those of both.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.h_upd, self.x_upd = (_resize(channels, dims, up, down) for _ in range(2))
        factor = 2 if use_scale_shift_norm else 1
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, factor * out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            window = {"kernel_size": 3, "padding": 1} if use_conv else {"kernel_size": 1}
            self.skip_connection = conv_nd(dims, channels, out_channels, **window)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        return _run(self._forward, self.use_checkpoint, x, emb, skip)

    def _forward(self, x: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
        norm, _, conv = self.in_layers
        h, x = (norm(x), x) if skip is None else norm.of_two(x, skip)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)
        time = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h, scale=scale, shift=shift)
        else:
            h = norm(h, add=time)
        return self.skip_connection(x) + conv(dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, plus the input: (B, C, ...) -> (B, C, ...).

    The channels of ``qkv`` are (heads, 3, C / heads), or (3, heads, C / heads) in the new order.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = _heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return _run(self._forward, self.use_checkpoint, x)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x, act="none").flatten(2))
        h = self.proj_out(_attention(qkv, self.num_heads, self.use_new_attention_order))
        return x + h.view(x.shape)


class AttentionPool2d(nn.Module):
    """What attention gives to the mean of all pixels: (B, C, H, W) -> (B, C_out) (Radford et al. 2021)."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, output_dim or embed_dim, 1)
        self.num_heads = _heads(embed_dim, 1, num_heads_channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        pixels = torch.cat([pixels.mean(2, keepdim=True), pixels], dim=2)
        pixels = pixels + self.positional_embedding.to(pixels.dtype)
        return self.c_proj(_attention(self.qkv_proj(pixels), self.num_heads, new_order=True))[:, :, 0]


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    return CONVOLUTIONS[dims](*args, **kwargs)


def normalization(channels: int) -> GroupNorm:
    """Over float16 too in float32, as the original: see `ops.group_norm_silu`."""
    return GroupNorm(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _resize(channels: int, dims: int, up: bool, down: bool) -> nn.Module:
    if up:
        return Upsample(channels, False, dims)
    return Downsample(channels, False, dims) if down else nn.Identity()


def _heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    heads = num_heads if num_head_channels == -1 else channels // num_head_channels
    if heads < 1 or channels % heads or (num_head_channels != -1 and channels % num_head_channels):
        raise ValueError(
            f"heads must divide {channels} channels, got num_heads={num_heads}, "
            f"num_head_channels={num_head_channels}"
        )
    return heads


def _attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """(B, 3C, pixels) -> (B, C, pixels): softmax(q k / sqrt(C / heads)) v."""
    if new_order:
        q, k, v = qkv.unflatten(1, (3, heads, -1)).transpose(3, 4).unbind(1)
    else:
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).transpose(3, 4).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


def _run(function, recompute: bool, *args: Tensor | None) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
