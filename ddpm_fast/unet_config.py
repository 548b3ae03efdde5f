"""What a `UNet` is made of, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["UNetConfig"]

_LATER = {"num_attention_heads", "resblock_updown", "timestep_input_dim", "timestep_scale"}
"""Fields that checkpoints may lack: they came after the first ones were written."""


@dataclass(frozen=True)
class UNetConfig:
    """What a `UNet` is made of. The defaults are the conventions of Ho et al. 2020.

    Attributes:
        block_out_channels: channels of each level, from the full resolution down.
        down_attention: per level on the way down: does attention follow each residual block?
        up_attention: the same on the way up, so from the lowest resolution to the full one.
        sample_size: image side or (height, width) of training; None if it was not recorded.
        in_channels, out_channels: of the image and of the prediction (2C with a learned variance).
        layers_per_block: residual blocks per level on the way down; the way up has one more.
        mid_attention: is there attention between the two residual blocks in the middle?
        attention_head_dim: channels per attention head; None for a single head.
        norm_num_groups, norm_eps: of every GroupNorm.
        attn_norm_num_groups: groups of the middle attention's GroupNorm. None: ``norm_num_groups`` with the
            "default" time shift, and no GroupNorm at all with "scale_shift" (as diffusers has it).
        downsample_padding: 1, or 0 to pad only the bottom and the right, by one (TensorFlow's "SAME").
        flip_sin_to_cos, freq_shift: the convention of :func:`timestep_embedding`.
        time_embedding_dim: None for ``4 * block_out_channels[0]``.
        center_input_sample: feed ``2 * x - 1``, for images in [0, 1].
        mid_block_scale_factor: every residual sum in the middle is divided by it.
        dropout: probability, before each residual block's second convolution.
        resnet_time_scale_shift: "default" adds the time embedding before the second norm; "scale_shift"
            scales and shifts after it (Dhariwal & Nichol 2021, arXiv 2105.05233).
        num_class_embeds: number of classes, or None for an unconditional model.
        num_attention_heads: of every attention, whatever its channels; in place of ``attention_head_dim``.
        resblock_updown: the resolution is changed within a residual block, by the mean of 2x2 pixels or by
            repeating one, and not by a convolution of its own (Dhariwal & Nichol 2021, after BigGAN);
            ``downsample_padding`` then has no effect.
        timestep_input_dim: width of the sinusoids of the time; None for ``block_out_channels[0]``.
        timestep_scale: the time is multiplied by it first: 1000 / T in Nichol & Dhariwal 2021.

    Raises:
        ValueError: naming the field, what was given and what is allowed.
    """

    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 2
    mid_attention: bool = True
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    attn_norm_num_groups: int | None = None
    downsample_padding: int = 0
    flip_sin_to_cos: bool = False
    freq_shift: float = 1
    time_embedding_dim: int | None = None
    center_input_sample: bool = False
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    resnet_time_scale_shift: str = "default"
    num_class_embeds: int | None = None
    num_attention_heads: int | None = None
    resblock_updown: bool = False
    timestep_input_dim: int | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "down_attention", "up_attention", "sample_size"):
            if isinstance(value := getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))

        def require(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"UNetConfig.{name}: got {getattr(self, name)!r}, allowed: {allowed}")

        def positive(*values: Any) -> bool:
            return all(isinstance(value, int) and value > 0 for value in values)

        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
            require(positive(getattr(self, name)), name, "a positive integer")
        counts = ("attention_head_dim", "attn_norm_num_groups", "time_embedding_dim", "num_class_embeds")
        for name in (*counts, "num_attention_heads", "timestep_input_dim"):
            value = getattr(self, name)
            require(value is None or positive(value), name, "a positive integer or None")

        channels, groups, head_dim = self.block_out_channels, self.norm_num_groups, self.attention_head_dim
        ok = isinstance(channels, tuple) and channels and positive(*channels)
        ok = ok and all(c % groups == 0 for c in channels)
        require(ok, "block_out_channels", f"one or more positive multiples of norm_num_groups={groups}")
        for name in ("down_attention", "up_attention"):
            flags = getattr(self, name)
            ok = isinstance(flags, tuple) and len(flags) == len(channels) and {*flags} <= {True, False}
            require(ok, name, f"{len(channels)} booleans, one for each of block_out_channels={channels}")

        here = zip(channels * 2, self.down_attention + self.up_attention[::-1], strict=True)
        attended = {c for c, flag in here if flag} | ({channels[-1]} if self.mid_attention else set())
        ok = head_dim is None or all(c % head_dim == 0 for c in attended)
        require(ok, "attention_head_dim", f"None or a divisor of the attended channels {sorted(attended)}")
        heads = self.num_attention_heads
        ok = heads is None or (head_dim is None and all(c % heads == 0 for c in attended))
        allowed = f"None or, without attention_head_dim, a divisor of each of {sorted(attended)}"
        require(ok, "num_attention_heads", allowed)
        ok = self.attn_norm_num_groups is None or channels[-1] % self.attn_norm_num_groups == 0
        require(ok, "attn_norm_num_groups", f"None or a divisor of the middle's {channels[-1]} channels")

        factor = 2 ** (len(channels) - 1)
        sides = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        ok = len(sides) == 2 and positive(*sides) and all(side % factor == 0 for side in sides)
        allowed = f"None, a positive multiple of {factor}, or two (each level below the first halves them)"
        require(self.sample_size is None or ok, "sample_size", allowed)

        for name in ("freq_shift", "norm_eps", "mid_block_scale_factor", "dropout", "timestep_scale"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number")
        for name in ("mid_attention", "flip_sin_to_cos", "center_input_sample", "resblock_updown"):
            require(isinstance(getattr(self, name), bool), name, "True or False")

        half = (self.timestep_input_dim or channels[0]) // 2
        require(self.freq_shift < half, "freq_shift", f"less than {half}, half the width of the sinusoids")
        require(self.norm_eps > 0, "norm_eps", "a positive number")
        require(self.downsample_padding in (0, 1), "downsample_padding", "0 or 1")
        require(0 < self.timestep_scale < math.inf, "timestep_scale", "a positive number")
        require(self.mid_block_scale_factor != 0, "mid_block_scale_factor", "a number other than 0")
        require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        ok = self.resnet_time_scale_shift in ("default", "scale_shift")
        require(ok, "resnet_time_scale_shift", "'default' or 'scale_shift'")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as values that JSON can hold; :meth:`from_dict` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Inverse of :meth:`to_dict`. Raises ValueError naming every field that is unknown or missing.

        A field that is younger than a checkpoint may be missing, and has its default.
        """
        names = {field.name for field in fields(cls)}
        unknown, missing = sorted(values.keys() - names), sorted(names - _LATER - values.keys())
        if unknown or missing:
            raise ValueError(f"UNetConfig.from_dict: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)
