"""The way down of guided-diffusion's U-Nets, and the classifier that ends there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ...unet import timestep_embedding
from .layers import (
    CONVOLUTIONS,
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    conv_nd,
    normalization,
    zero_module,
)


class Encoder(nn.Module):
    """The time's embedding and the way down to the middle, which `UNetModel` and the classifier share."""

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if dims not in CONVOLUTIONS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order

        time_embed_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)

        self._widths = [int(factor * model_channels) for factor in channel_mult]
        channels, last = self._widths[0], len(self._widths) - 1
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, channels, 3, padding=1))]
        )
        self._skips = [channels]
        for level, width in enumerate(self._widths):
            for _ in range(num_res_blocks):
                block = [self._res_block(channels, width), *self._attention(level, width, num_heads)]
                self.input_blocks.append(TimestepEmbedSequential(*block))
                self._skips.append(channels := width)
            if level < last:
                self.input_blocks.append(TimestepEmbedSequential(self._resample(channels, down=True)))
                self._skips.append(channels)

        self.middle_block = TimestepEmbedSequential(
            self._res_block(channels, channels),
            self._attention_block(channels, num_heads),
            self._res_block(channels, channels),
        )
        self._finish()

    def _finish(self) -> None:
        """Make what follows the middle, where it is not for the constructor of a subclass."""

    @property
    def inner_dtype(self) -> torch.dtype:
        """What the input is cast to."""
        return self.dtype

    def _res_block(self, channels: int, out_channels: int, **updown: bool) -> ResBlock:
        return ResBlock(
            channels,
            4 * self.model_channels,
            self.dropout,
            out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            **updown,
        )

    def _attention_block(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels,
            num_heads,
            self.num_head_channels,
            self.use_checkpoint,
            self.use_new_attention_order,
        )

    def _attention(self, level: int, channels: int, num_heads: int) -> list[nn.Module]:
        attends = 2**level in self.attention_resolutions
        return [self._attention_block(channels, num_heads)] if attends else []

    def _resample(self, channels: int, *, down: bool = False, up: bool = False) -> nn.Module:
        if self.resblock_updown:
            return self._res_block(channels, channels, up=up, down=down)
        return (Downsample if down else Upsample)(channels, self.conv_resample, self.dims)

    def _torso(self) -> tuple[nn.Module, ...]:
        return self.input_blocks, self.middle_block

    def convert_to_fp16(self) -> None:
        """The convolutions before ``out`` to float16; norms, embeddings and ``out`` stay as they are."""
        self._convert(torch.float16)

    def convert_to_fp32(self) -> None:
        """The convolutions before ``out`` to float32."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for part in self._torso():
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    for parameter in module.parameters():
                        parameter.data = parameter.data.to(dtype)

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        if (y is None) != (self.num_classes is None):
            given = "no y" if y is None else "y"
            raise AssertionError(
                "y must be given if and only if the model is class-conditional: "
                f"{given} was, and num_classes is {self.num_classes}"
            )
        if y is not None and y.shape != x.shape[:1]:
            raise AssertionError(f"y must have shape ({len(x)},), got {tuple(y.shape)}")
        waves = timestep_embedding(timesteps, self.model_channels, flip_sin_to_cos=True, freq_shift=0)
        emb = self.time_embed(waves.to(self.time_embed[0].weight.dtype))
        return emb if y is None else emb + self.label_emb(y)


class EncoderUNetModel(Encoder):
    """The first half of the U-Net and a pool: the classifier that guides (Dhariwal & Nichol 2021, section 4).

    Args:
        pool: "adaptive" (the mean of the last activation), "attention" (`AttentionPool2d`, which needs
            num_head_channels), "spatial" or "spatial_v2" (the means of all activations, through an MLP).
        image_size: with "attention" that of the images, which the pool's positions are of.
        out_channels: classes.

    The other arguments are those of `UNetModel`.

    Raises:
        AssertionError, NotImplementedError: as the original, for a pool without its heads, or not known.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            None,
            use_checkpoint,
            use_fp16,
            num_heads,
            num_head_channels,
            num_heads_upsample,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.pool = pool
        channels, features = self._widths[-1], sum(self._skips) + self._widths[-1]
        layers: list[nn.Module]
        if pool == "adaptive":
            last = zero_module(conv_nd(dims, channels, out_channels, 1))
            layers = [normalization(channels), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten()]
        elif pool == "attention":
            if num_head_channels == -1:
                raise AssertionError("num_head_channels must be given for the pool 'attention'")
            side = image_size // 2 ** (len(self._widths) - 1)
            attention = AttentionPool2d(side, channels, num_head_channels, out_channels)
            layers = [normalization(channels), nn.SiLU(), attention]
        elif pool == "spatial":
            layers = [nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels)]
        elif pool == "spatial_v2":
            layers = [nn.Linear(features, 2048), normalization(2048), nn.SiLU()]
            layers.append(nn.Linear(2048, out_channels))
        else:
            raise NotImplementedError(
                f"pool must be 'adaptive', 'attention', 'spatial' or 'spatial_v2', got {pool!r}"
            )
        self.out = nn.Sequential(*layers)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """``x`` (B, in_channels, H, W) and ``timesteps`` (B,) to logits (B, out_channels)."""
        emb, h, means = self._embed(x, timesteps, None), x.to(self.inner_dtype), []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.to(x.dtype).mean(dim=(2, 3)))
        h = torch.cat(means, dim=1) if means else h.to(x.dtype)
        for layer in self.out:
            if not isinstance(layer, nn.SiLU):  # whose work the norm before it does
                h = layer(h)
        return h
