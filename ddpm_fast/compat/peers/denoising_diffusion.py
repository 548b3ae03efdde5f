"""denoising-diffusion-pytorch: its own U-Net, as near to our config as its arguments allow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...unet import UNet, UNetConfig
from . import Network, Peer, require


def unet(config: UNetConfig) -> nn.Module:
    """Its ``Unet`` of the same widths: linear attention on every level, full attention on the last.

    Random weights: there are no others that fit. Raises Missing where it is not installed.
    """
    require("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch import Unet

    width, *_ = config.block_out_channels
    multiples = tuple(channels // width for channels in config.block_out_channels)
    return Unet(width, dim_mults=multiples, channels=config.in_channels, flash_attn=True)


def training(config: UNetConfig) -> nn.Module:
    """Its ``GaussianDiffusion``, which gives the loss of images in [0, 1]."""
    network = unet(config)
    from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(network, image_size=config.sample_size, objective="pred_noise").train()


def _build(model: UNet, x: Tensor, *, dtype: torch.dtype) -> Network:
    theirs = unet(model.config).to(x.device).eval()
    half = dtype != torch.float32

    @torch.no_grad()
    def network(x: Tensor, t: int) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=half):  # its trainer's way: its time stays float32
            return theirs(x, torch.full((len(x),), t, device=x.device))

    return network


PEERS = [
    Peer("denoising-diffusion-pytorch", torch.float32, partial(_build, dtype=torch.float32), converts=False),
    Peer(
        "denoising-diffusion-pytorch, bfloat16",
        torch.bfloat16,
        partial(_build, dtype=torch.bfloat16),
        converts=False,
    ),
]
