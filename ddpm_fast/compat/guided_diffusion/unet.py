"""guided-diffusion's U-Nets: its constructors, its state dicts, its half precision, on our ops."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.openai import config_of, share_openai
from ...convolution import Conv2d
from ...cuda_graph import Version, version
from ...unet import GroupNorm, UNet
from .encoder import Encoder, EncoderUNetModel
from .layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    conv_nd,
    normalization,
    zero_module,
)

__all__ = ["EncoderUNetModel", "SuperResModel", "UNetModel"]


class UNetModel(Encoder):
    """guided-diffusion's U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233), argument by argument.

    Args:
        image_size: not used in computing.
        in_channels, model_channels, out_channels: of the image, a level of multiplier 1, the prediction.
        num_res_blocks: per level on the way down; the way up has one more.
        attention_resolutions: the downsampling rates, 1, 2, 4, ..., at which attention follows each of them.
        dropout: probability, before the second convolution of each.
        channel_mult: of each level.
        conv_resample: change the resolution by convolutions, or by means and repeated pixels alone.
        dims: 1, 2 or 3.
        num_classes: None for an unconditional model.
        use_checkpoint: where gradients are taken, recompute each block's activations in the backward.
        use_fp16: cast the input to float16, for weights that `convert_to_fp16` has converted.
        num_heads, num_head_channels: of each attention: their number or, if it is not -1, their channels.
        num_heads_upsample: on the way up, if it is not -1 and num_head_channels is.
        use_scale_shift_norm: the time scales and shifts after the second norm, and is not added before it.
        resblock_updown: change the resolution within residual blocks.
        use_new_attention_order: see `AttentionBlock`.

    Raises:
        ValueError: dims, or heads that do not divide the channels.
    """

    def _finish(self) -> None:
        skips, channels = list(self._skips), self._widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, width in [*enumerate(self._widths)][::-1]:
            for layer in range(self.num_res_blocks + 1):
                block = [self._res_block(channels + skips.pop(), width)]
                block += self._attention(level, width, self.num_heads_upsample)
                if level and layer == self.num_res_blocks:
                    block.append(self._resample(width, up=True))
                self.output_blocks.append(TimestepEmbedSequential(*block))
                channels = width
        self.out = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            zero_module(conv_nd(self.dims, self._widths[0], self.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """One evaluation of the network.

        Args:
            x: ``(B, in_channels, ...)``, of ``dims`` dimensions, each halved at every level but the last.
            timesteps: ``(B,)``, integer or floating.
            y: ``(B,)`` int64, the classes, for a class-conditional model, and only for one.

        Returns:
            ``(B, out_channels, ...)`` in ``x``'s dtype.

        Raises:
            AssertionError: y is missing, not expected or of another shape, as in the original.
        """
        h, skips, emb = self._encode(x, timesteps, y)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(h, emb, skips.pop())
        norm, _, conv = self.out
        return conv(norm(h.to(x.dtype)))

    def _encode(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """What the way down ends with, all that it leaves for the way up, and the embedding."""
        emb, skips, h = self._embed(x, timesteps, y), [], x.to(self.inner_dtype)
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return h, skips, emb

    def _torso(self) -> tuple[nn.Module, ...]:
        return *super()._torso(), self.output_blocks

    def as_ddpm_fast(self) -> UNet | None:
        """This network as a `UNet` for sampling, in eval mode, to be called as ``model(x, t, class_labels)``.

        It lies on the memory of these weights, so that their change in place is there at once. The q, k and v
        of several heads in the legacy order are copied: call this again after a change of the weights, which
        copies them again and is cheap.

        Returns:
            The same object as long as nothing but the weights' values changes. None where a `UNet` would be
            another network: ``dims`` other than 2, no ``conv_resample``, half precision, other heads on the
            way up, a subclass with a forward of its own, a hook, or a module that was exchanged.
        """
        now, kept = version(self), _SHARED.get(self)
        if kept is not None and kept[0] == now:
            _, model, copies = kept
            with torch.no_grad():
                for ours, theirs in copies:
                    ours.copy_(theirs)
            return model
        _SHARED.pop(self, None)
        model, copies = self._shared()
        _SHARED[self] = now, model, copies
        return model

    @torch.inference_mode(False)  # it outlives the caller's mode
    @torch.no_grad()
    def _shared(self) -> tuple[UNet | None, list[tuple[Tensor, Tensor]]]:
        dtypes = {parameter.dtype for parameter in self.parameters()}
        fits = (
            self.dims == 2 and (self.conv_resample or self.resblock_updown) and dtypes == {self.inner_dtype}
        )
        if not fits or not self._is_plain():
            return None, []
        try:
            config = config_of(
                image_size=self.image_size,
                in_channels=self.in_channels,
                model_channels=self.model_channels,
                out_channels=self.out_channels,
                num_res_blocks=self.num_res_blocks,
                attention_resolutions=self.attention_resolutions,
                dropout=float(self.dropout),
                channel_mult=self.channel_mult,
                num_classes=self.num_classes,
                num_heads=self.num_heads,
                num_head_channels=self.num_head_channels,
                num_heads_upsample=self.num_heads_upsample,
                use_scale_shift_norm=self.use_scale_shift_norm,
                resblock_updown=self.resblock_updown,
            )
            return share_openai(config, self.state_dict(), self.use_new_attention_order, type(self).__name__)
        except ValueError:
            return None, []

    def _is_plain(self) -> bool:
        """Whether a call computes what the arguments say, and nothing else."""
        return type(self).forward is UNetModel.forward and all(
            not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
            and (part is self or type(part) in _PARTS)
            for part in self.modules()
        )


class SuperResModel(UNetModel):
    """A U-Net that sees a low-resolution image enlarged beside the noisy one."""

    def __init__(self, image_size: int | None, in_channels: int, *args, **kwargs) -> None:
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs) -> Tensor:
        """As `UNetModel.forward`, with ``low_res`` ``(B, in_channels, h, w)``, of any size."""
        return super().forward(beside(x, low_res), timesteps, **kwargs)


def beside(x: Tensor, low_res: Tensor | None) -> Tensor:
    """[x, low_res], enlarged to x's size: what a `SuperResModel` sees."""
    if low_res is None:
        raise ValueError("low_res must be given: a SuperResModel enlarges it")
    return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)


_SHARED: WeakKeyDictionary[UNetModel, tuple[Version, UNet | None, list[tuple[Tensor, Tensor]]]] = (
    WeakKeyDictionary()
)
"""Of each `UNetModel` its `UNet`: beside it, since as an attribute it would be copied and saved with it."""

_PARTS = {
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNorm,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    nn.AvgPool2d,
    nn.Conv1d,
    nn.Dropout,
    nn.Embedding,
    nn.Identity,
    nn.Linear,
    nn.ModuleList,
    nn.SiLU,
    nn.Sequential,
}
"""What a `UNetModel` is made of: of another type is what somebody exchanged."""
