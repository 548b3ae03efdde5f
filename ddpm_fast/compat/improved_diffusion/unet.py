"""improved-diffusion's U-Nets: guided-diffusion's, with fewer arguments and `get_feature_vectors`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..guided_diffusion import unet
from ..guided_diffusion.unet import beside

__all__ = ["SuperResModel", "UNetModel"]


class UNetModel(unet.UNetModel):
    """improved-diffusion's U-Net (Nichol & Dhariwal 2021, arXiv 2102.09672), argument by argument.

    They mean what they mean in `guided_diffusion.UNetModel`; the attention's order is the legacy one.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
    ) -> None:
        super().__init__(
            None,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            num_classes,
            use_checkpoint,
            num_heads=num_heads,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
        )

    @property
    def inner_dtype(self) -> torch.dtype:
        """That of the blocks' first weight: after `convert_to_fp16` the input is cast to float16."""
        return next(self.input_blocks.parameters()).dtype

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None
    ) -> dict[str, list[Tensor] | Tensor]:
        """What each block returns, in ``x``'s dtype: lists "down" and "up", and "middle"; as `forward`."""
        h, skips, emb = self._encode(x, timesteps, y)
        down = [skip.to(x.dtype) for skip in skips]
        h = self.middle_block(h, emb)
        middle, up = h.to(x.dtype), []
        for block in self.output_blocks:
            h = block(h, emb, skips.pop())
            up.append(h.to(x.dtype))
        return {"down": down, "middle": middle, "up": up}


class SuperResModel(UNetModel):
    """A U-Net that sees a low-resolution image enlarged beside the noisy one."""

    def __init__(self, in_channels: int, *args, **kwargs) -> None:
        super().__init__(2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs) -> Tensor:
        """As `UNetModel.forward`, with ``low_res`` ``(B, in_channels, h, w)``, of any size."""
        return super().forward(beside(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs
    ) -> dict[str, list[Tensor] | Tensor]:
        return super().get_feature_vectors(beside(x, low_res), timesteps, **kwargs)
