"""The U-Net of Ho et al. 2020 (arXiv 2006.11239, appendix B), in the forms that its descendants gave it.

One topology: 3x3 convolution in; levels of residual blocks, each level optionally with self-attention, the
resolution halved between levels; residual block, attention, residual block in the middle; the way back up,
each block also reading one stored activation of the way down; norm, SiLU, 3x3 convolution out. All else is a
field of `UNetConfig`. Fields and parameters have diffusers' names where it has one for the same thing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .convolution import Conv2d, Linear, own_linear
from .ops._dispatch import runs_native
from .unet_config import UNetConfig

__all__ = ["TimeRows", "UNet", "UNetConfig", "timestep_embedding"]


def timestep_embedding(
    t: Tensor, dim: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 1
) -> Tensor:
    """Sinusoids of the time (Vaswani et al. 2017): ``[sin(t w), cos(t w)]``, ``w_k = 10000^(-k / n)``.

    Args:
        t: ``(B,)``, integer or floating.
        dim: of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: ``[cos, sin]`` instead (OpenAI's convention; Ho et al. 2020 have sin first).
        freq_shift: ``n = dim // 2 - freq_shift``: 1 in Ho et al. 2020, 0 in OpenAI's code.

    Returns:
        ``(B, dim)``, computed in float64 if ``t`` is float64, else in float32.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / (half - freq_shift)
    angle = t[:, None].to(dtype) * exponent.exp()
    sin, cos = angle.sin(), angle.cos()
    waves = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(waves, (0, 1)) if dim % 2 else waves


@dataclass(frozen=True)
class TimeRows:
    """What a :class:`UNet` computes once a run, before it sees an image; see `UNet.time_rows`.

    Attributes:
        values: ``(N * K, sum(widths))``: each of N times with each of K classes through every residual
            block's projection, the blocks side by side. A row is all that one image reads at one step.
        biases: ``(sum(bias_widths),)``: `ResBlock.last_bias` of the blocks that have one.
        labels: ``(B,)`` int64: which of the K classes each image has; None for a model without classes.
    """

    values: Tensor
    widths: tuple[int, ...]
    biases: Tensor
    bias_widths: tuple[int, ...]
    labels: Tensor | None
    classes: int


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``'s parameters on the fused op: `ops.group_norm_silu` explains the keywords."""

    def forward(self, x: Tensor, **fused: Any) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, **fused)

    def fold(self, x: Tensor, **fused: Tensor | None) -> Tensor:
        """What a layer reads that normalises x itself: `ops.group_norm_fold`."""
        return ops.group_norm_fold(x, self.num_groups, self.weight, self.bias, self.eps, **fused)

    def of_two(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of [x, skip], and [x, skip], in one pass over both."""
        return ops.group_norm_silu_concat(
            x, skip, self.num_groups, self.weight, self.bias, self.eps, concat=True
        )


class RowLinear(nn.Linear):
    """``nn.Linear`` on (rows, features); a row's result in float32 on the CPU is the same among any others.

    A BLAS sums in another order for another count of rows. As a batch of products of one row each they are
    bit-equal; without a gradient, since that of the repeated weight would be a weight a row.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype != torch.float32 or x.device.type != "cpu"
        plain = plain or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if plain or torch.is_grad_enabled():
            return super().forward(x)
        weight = self.weight.t().expand(len(x), -1, -1)
        return torch.baddbmm(self.bias, x[:, None], weight)[:, 0]


class Shortcut(nn.Conv2d):
    """1x1 convolution of ``x`` without its bias, added to ``h``: in place outside autograd, in one pass.

    (B, C_in, H, W), (B, C_out, H, W) -> (B, C_out, H, W), in ``h``'s layout. With ``skip`` of [x, skip].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, h: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            return self._of_two(x, skip, h)
        x, weight = x.to(h.dtype), self.weight.to(h.dtype).flatten(1)  # they differ under autocast only
        if torch.is_grad_enabled():  # a backward hook refuses a change in place
            if not (h.is_cpu and h.is_contiguous(memory_format=torch.channels_last)):
                return h + F.conv2d(x, weight[:, :, None, None])
            h = h.permute(0, 2, 3, 1)  # on the CPU 1.2 to 1.5 times as fast, forward and backward
            rows = torch.addmm(h.flatten(0, 2), x.permute(0, 2, 3, 1).flatten(0, 2), weight.t())
            return rows.reshape(h.shape).permute(0, 3, 1, 2)
        if h.is_contiguous():
            h.flatten(2).baddbmm_(weight.expand(len(h), -1, -1), x.flatten(2))
            return h
        x, h_pixels = x.permute(0, 2, 3, 1), h.permute(0, 2, 3, 1)
        total = own_linear(self, x, None, plus=h_pixels)
        if total is not None:
            return total.permute(0, 3, 1, 2)
        h_pixels.flatten(0, 2).addmm_(x.flatten(0, 2), weight.t())
        return h

    def _of_two(self, x: Tensor, skip: Tensor, h: Tensor) -> Tensor:
        """Outside autograd, of channels_last tensors of one dtype."""
        x, skip, h_pixels = (v.permute(0, 2, 3, 1) for v in (x, skip, h))
        total = own_linear(self, x, None, plus=h_pixels, skip=skip)
        if total is not None:
            return total.permute(0, 3, 1, 2)
        rows, weights = h_pixels.flatten(0, 2), self.weight.flatten(1).split((x.shape[3], skip.shape[3]), 1)
        for part, weight in zip((x, skip), weights, strict=True):
            rows.addmm_(part.flatten(0, 2), weight.t())
        return h


class Dropout(nn.Dropout):
    """``nn.Dropout``; on the CPU by one number of torch's generator, from which a kernel draws its mask."""

    def forward(self, x: Tensor) -> Tensor:
        plain = not self.training or torch.compiler.is_compiling() or not x.is_cpu or not 0 < self.p < 1
        if plain or not runs_native("dropout", x):
            return super().forward(x)
        return ops.dropout(x, self.p, torch.randint(-(2**63), 2**63 - 1, ()))


class ResBlock(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, dropout, conv, plus the input: (B, C_in, H, W) -> (B, C_out, H, W).

    ``time`` is what `time_emb_proj` made of the time embedding, (B, C_out) or (B, 2 C_out), and ``bias`` is
    `last_bias`: neither depends on x, so that a run computes them once. With ``skip`` the input is [x, skip].
    With ``resize`` "down" or "up", H and W are halved or doubled between the first SiLU and convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        output_scale: float = 1.0,
        resize: str | None = None,
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.resize = resize
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        time_dim = config.time_embedding_dim or 4 * config.block_out_channels[0]
        self.time_emb_proj = RowLinear(time_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = Dropout(config.dropout) if config.dropout else nn.Identity()
        self.conv2 = _zero(Conv2d(out_channels, out_channels, 3, padding=1))
        self.widens = in_channels != out_channels
        self.conv_shortcut = Shortcut(in_channels, out_channels) if self.widens else nn.Identity()

    def last_bias(self) -> Tensor | None:
        """(C_out,): of the second convolution and the shortcut's together, where there is such a one."""
        return self.conv2.bias + self.conv_shortcut.bias if self.widens else None

    def forward(self, x: Tensor, time: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
        joins = skip is None or (type(self.conv_shortcut) is Shortcut and _unwatched(self.conv_shortcut))
        if self.resize is None and joins and _leaves_norm(self.norm1, self.conv1, x):
            h = self.conv1(x, norm=self.norm1.fold(x, skip=skip), skip=skip)
        else:
            h, x = (self.norm1(x), x) if skip is None else self.norm1.of_two(x, skip)
            skip = None
            first = "repeat" if self.resize == "up" else None
            if self.resize == "down":
                h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
            elif self.resize == "up":
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            h = self.conv1(h, first=first)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            fused = {"scale": scale, "shift": shift}
        else:
            fused = {"add": time}
        norm = None
        drops = self.dropout.training and isinstance(self.dropout, Dropout)
        if not drops and _unwatched(self.dropout) and _leaves_norm(self.norm2, self.conv2, h):
            norm = self.norm2.fold(h, **fused)
        else:
            h = self.dropout(self.norm2(h, **fused))
        if self.widens:
            h = self.conv_shortcut(x, self.conv2(h, bias=bias, norm=norm), skip)
        else:
            h = self.conv2(h, plus=x, norm=norm)
        return h if self.output_scale == 1 else h / self.output_scale


class Attention(nn.Module):
    """Self-attention over the pixels, plus the input: (B, C, H, W) -> (B, C, H, W).

    ``groups`` None leaves the norm out. A channels_last ``x`` is read and written without a copy.
    """

    def __init__(
        self, channels: int, groups: int | None, config: UNetConfig, output_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.heads = config.num_attention_heads or channels // (config.attention_head_dim or channels)
        self.group_norm = None if groups is None else GroupNorm(groups, channels, config.norm_eps)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = _zero(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = _attended(self._projected(x), self.heads)  # (B, HW, 3C) -> (B, HW, C)
        if self.output_scale == 1 and x.is_contiguous(memory_format=torch.channels_last):
            pixels = x.permute(0, 2, 3, 1)
            return self.to_out(h.view(pixels.shape), plus=pixels).permute(0, 3, 1, 2)
        h = self.to_out(h).transpose(1, 2).unflatten(2, x.shape[2:])
        return _residual(x, h, self.output_scale)

    def _projected(self, x: Tensor) -> Tensor:
        """The norm, and of its tokens queries, keys and values."""
        norm, layer = self.group_norm, self.to_qkv
        if type(norm) is GroupNorm and type(layer) is Linear and _unwatched(norm, layer):
            tokens = x.flatten(2).transpose(1, 2)
            qkv = own_linear(layer, tokens, layer.bias, norm=lambda: norm.fold(x))
            if qkv is not None:
                return qkv
        h = x if self.group_norm is None else self.group_norm(x, act="none")
        return self.to_qkv(h.flatten(2).transpose(1, 2).contiguous())  # else the bias would be a pass


def _attended(qkv: Tensor, heads: int) -> Tensor:
    """`ops.attention` where it has a kernel and no gradient is asked for; elsewhere PyTorch's.

    256 tokens of 256 channels, one thread, times as fast as PyTorch's on the same instruction set: 2.3 on AMX
    (bfloat16 1.5), 1.1 on AVX-512 (1.3), 1.0 on AVX2 (1.1).
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and not qkv.requires_grad and runs_native("attention", qkv):
        return ops.attention(qkv, heads)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if q.dtype != torch.bfloat16 or not q.is_cpu or not q.requires_grad:
        h = F.scaled_dot_product_attention(q, k, v)
    else:  # of bfloat16 torch's gradient takes nine times as long on the CPU
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return h.transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, first="pad" if self.conv.padding == (0, 0) else None)


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, first="repeat")


class Level(nn.Module):
    """One resolution: its residual blocks, what follows each of them, the change of resolution at the end."""

    def __init__(
        self, resnets: list[nn.Module], attentions: list[nn.Module], resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample


class UNet(nn.Module):
    """Predicts noise, x0 or v from a noisy image and its time (Ho et al. 2020; Dhariwal & Nichol 2021).

    Weights start as PyTorch starts them, except that the second convolution of every residual block, the
    output projection of every attention and the last convolution start at zero (Ho et al.: scaled by 1e-10).
    So every block begins as its shortcut, and an untrained network predicts 0.

    Traces whole under ``torch.compile(fullgraph=True)`` and keeps channels_last throughout.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, groups = config.block_out_channels, config.norm_num_groups
        width, last = channels[0], len(channels) - 1
        time_dim = config.time_embedding_dim or 4 * width
        waves = config.timestep_input_dim or width

        def level(widths: list[tuple[int, int]], attend: bool, resample: nn.Module | None) -> Level:
            resnets = [ResBlock(before, after, config) for before, after in widths]
            attentions = [
                Attention(after, groups, config) if attend else nn.Identity() for _, after in widths
            ]
            return Level(resnets, attentions, resample)

        def resample(out: int, resize: str) -> nn.Module:
            if config.resblock_updown:
                return ResBlock(out, out, config, resize=resize)
            return Downsample(out, config.downsample_padding) if resize == "down" else Upsample(out)

        self.time_embedding = nn.Sequential(
            OrderedDict(
                linear_1=RowLinear(waves, time_dim),
                act=nn.SiLU(),
                linear_2=RowLinear(time_dim, time_dim),
            )
        )
        classes = config.num_class_embeds
        self.class_embedding = None if classes is None else nn.Embedding(classes, time_dim)
        self.conv_in = Conv2d(config.in_channels, width, 3, padding=1)

        skips = [width]
        self.down_blocks = nn.ModuleList()
        for i, (out, attend) in enumerate(zip(channels, config.down_attention, strict=True)):
            widths = [(width, out)] + [(out, out)] * (config.layers_per_block - 1)
            self.down_blocks.append(level(widths, attend, resample(out, "down") if i < last else None))
            skips += [out] * (config.layers_per_block + (i < last))
            width = out

        scale = config.mid_block_scale_factor
        mid_groups = config.attn_norm_num_groups
        if mid_groups is None and config.resnet_time_scale_shift == "default":
            mid_groups = groups
        between = Attention(width, mid_groups, config, scale) if config.mid_attention else nn.Identity()
        resnets = [ResBlock(width, width, config, scale) for _ in range(2)]
        self.mid_block = Level(resnets, [between, nn.Identity()], None)

        self.up_blocks = nn.ModuleList()
        for i, (out, attend) in enumerate(zip(channels[::-1], config.up_attention, strict=True)):
            inner = [width] + [out] * config.layers_per_block
            widths = [(before + skips.pop(), out) for before in inner]
            self.up_blocks.append(level(widths, attend, resample(out, "up") if i < last else None))
            width = out

        self.conv_norm_out = GroupNorm(groups, width, config.norm_eps)
        self.conv_out = _zero(Conv2d(width, config.out_channels, 3, padding=1))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image. Raises ValueError if the config has no ``sample_size``."""
        size = self.config.sample_size
        if size is None:
            raise ValueError("this U-Net's config has no sample_size: give the shape")
        return (self.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """One evaluation of the network.

        Args:
            x: ``(B, in_channels, H, W)`` in the parameters' dtype; each level but the last halves H and W.
            t: training time: ``(B,)`` or 0-d tensor, integer or floating, or a number.
            class_labels: ``(B,)`` int64, for a model with ``num_class_embeds``, and only for one.

        Returns:
            ``(B, out_channels, H, W)``, in ``x``'s dtype and layout.

        Raises:
            ValueError: a shape or dtype that the model cannot take, or class labels missing or not expected.
        """
        self._check(x)
        self._check_labels(class_labels, x.shape[:1])
        temb = self._embed(self._times(t, x), class_labels)
        times = [block.time_emb_proj(temb).expand(len(x), -1) for block in self._blocks()]
        return self._body(x, times, [block.last_bias() for block in self._blocks()])

    def time_rows(self, timesteps: Tensor, class_labels: Tensor | None = None) -> TimeRows:
        """All that the network makes of the times of a run, and of its classes, for `forward_rows`.

        A later change of the weights does not show in it: compute it once a run.

        Args:
            timesteps: ``(N,)``, integer or floating, on the parameters' device: the time of each step.
            class_labels: ``(B,)`` int64, of a class-conditional model; one row a step for each that differs.

        Raises:
            ValueError: a shape that does not fit, or class labels missing or not expected.
        """
        if timesteps.dim() != 1 or not len(timesteps):
            raise ValueError(f"timesteps must have shape (N,), N >= 1, got {tuple(timesteps.shape)}")
        self._check_labels(class_labels, None if class_labels is None else class_labels.shape[:1])
        t, labels, classes = self._times(timesteps, timesteps), None, 1
        if class_labels is None:
            temb = self._embed(t, None)
        else:
            distinct, labels = class_labels.unique(return_inverse=True)
            classes = len(distinct)
            temb = self._embed(t.repeat_interleave(classes), distinct.repeat(len(t)))
        times = [block.time_emb_proj(temb) for block in self._blocks()]
        biases = [block.last_bias() for block in self._blocks()]
        biases = [times[0].new_empty(0) if bias is None else bias for bias in biases]
        return TimeRows(
            values=torch.cat(times, dim=1),
            widths=tuple(time.shape[1] for time in times),
            biases=torch.cat(biases),
            bias_widths=tuple(len(bias) for bias in biases),
            labels=labels,
            classes=classes,
        )

    def forward_rows(self, x: Tensor, rows: TimeRows, i: Tensor) -> Tensor:
        """`forward` at step ``i`` of a run, its time read from `time_rows`.

        In float32 on the CPU, without gradients, they are bit-equal.

        Args:
            x: as in `forward`, on the rows' device.
            rows: of this model, its class labels (if any) as many as ``x`` has images.
            i: the step, 0-d or ``(B,)`` int64, on that device; its value is not read on the host.

        Raises:
            ValueError: a shape or dtype that the model cannot take.
        """
        self._check(x)
        batch = len(x)
        if i.shape not in ((), (batch,)):
            raise ValueError(f"i must have shape () or ({batch},), got {tuple(i.shape)}")
        if rows.labels is not None:
            self._check_labels(rows.labels, x.shape[:1])
            i = i * rows.classes + rows.labels
        values = rows.values.index_select(0, i.reshape(-1)).expand(batch, -1)
        return self._body(x, values.split(rows.widths, dim=1), rows.biases.split(rows.bias_widths))

    def is_plain(self) -> bool:
        """Whether `forward_rows` may stand for a call: no subclass, hook or own forward would miss it."""
        return (
            type(self) is UNet
            and "forward" not in vars(self)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self.modules())
        )

    def _blocks(self) -> Iterator[ResBlock]:
        """Every residual block, in the order in which the network calls them."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from level.resnets
            if self.config.resblock_updown and level.resample is not None:
                yield level.resample

    def _body(self, x: Tensor, times: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """The network on x and what does not depend on it: each block's `time` and `bias`."""
        given = iter(zip(times, biases, strict=True))

        def resampled(h: Tensor, resample: nn.Module) -> Tensor:
            return resample(h, *next(given)) if self.config.resblock_updown else resample(h)

        h = self.conv_in(2 * x - 1 if self.config.center_input_sample else x)
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(resnet(h, *next(given)))
                skips.append(h)
            if level.resample is not None:
                h = resampled(h, level.resample)
                skips.append(h)
        for resnet, attention in zip(self.mid_block.resnets, self.mid_block.attentions, strict=True):
            h = attention(resnet(h, *next(given)))
        for level in self.up_blocks:
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                h = attention(resnet(h, *next(given), skips.pop()))
            if level.resample is not None:
                h = resampled(h, level.resample)
        if _leaves_norm(self.conv_norm_out, self.conv_out, h):
            return self.conv_out(h, norm=self.conv_norm_out.fold(h))
        return self.conv_out(self.conv_norm_out(h))

    def _times(self, t: Tensor | float, x: Tensor) -> Tensor:
        """A time for each of x's B samples, ``(B,)``, or one for all, ``(1,)``: floating, on x's device."""
        batch, dtype = len(x), self.time_embedding.linear_1.weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=exact, device=x.device)
        if t.shape not in ((), (1,), (batch,)):
            raise ValueError(f"t must be a number or have shape () or ({batch},), got {tuple(t.shape)}")
        t = t.to(device=x.device, dtype=exact).reshape(-1)
        return t if self.config.timestep_scale == 1 else t * self.config.timestep_scale

    def _embed(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """SiLU of the embedding of time and class, which broadcast: (1 or B, time_dim)."""
        waves = timestep_embedding(
            t,
            self.config.timestep_input_dim or self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        embedding = self.time_embedding(waves.to(self.time_embedding.linear_1.weight.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)
        return F.silu(embedding)

    def _check(self, x: Tensor) -> None:
        channels, factor = self.config.in_channels, 2 ** (len(self.config.block_out_channels) - 1)
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must be (B, {channels}, H, W) with H and W divisible by {factor}, got {tuple(x.shape)}"
            )
        if x.dtype != self.conv_in.weight.dtype:
            raise ValueError(f"x is {x.dtype} and the model's parameters are {self.conv_in.weight.dtype}")

    def _check_labels(self, class_labels: Tensor | None, shape: tuple[int] | None) -> None:
        if (class_labels is None) != (self.class_embedding is None):
            state = "needs" if class_labels is None else "has no class embedding and takes no"
            raise ValueError(
                f"this U-Net {state} class_labels (num_class_embeds={self.config.num_class_embeds})"
            )
        if class_labels is not None and class_labels.shape != shape:
            raise ValueError(f"class_labels must have shape {tuple(shape)}, got {tuple(class_labels.shape)}")


def _leaves_norm(norm: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    """Whether a convolution works out the norm and SiLU before it; nobody replaced or looks at either."""
    plain = type(norm) is GroupNorm and type(layer) is Conv2d and _unwatched(norm, layer)
    return plain and layer.normalises(x)


def _unwatched(*modules: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _residual(x: Tensor, h: Tensor, output_scale: float) -> Tensor:
    # x first: where the layouts differ, the sum takes that of its first operand.
    total = x + h
    return total if output_scale == 1 else total / output_scale


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
