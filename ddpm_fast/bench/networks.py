"""The U-Nets that are measured, and ours with each of its techniques on or off."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import torch
from torch import Tensor

from ..compat.peers import Network, compiled
from ..convolution import Packs, can_pack, packing
from ..replay import Replayed
from ..unet import UNet, UNetConfig
from .plain import plain_ops
from .settings import Settings

CIFAR = UNetConfig(
    block_out_channels=(128, 256, 256, 256),
    down_attention=(False, True, False, False),
    up_attention=(False, False, True, False),
    sample_size=32,
)
"""google/ddpm-cifar10-32, which is Ho et al. 2020's for CIFAR-10."""

CELEBA_HQ = UNetConfig(
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_attention=(False, False, False, False, True, False),
    up_attention=(False, True, False, False, False, False),
    sample_size=256,
)
"""google/ddpm-celebahq-256."""

SMALL = UNetConfig(
    block_out_channels=(32, 64),
    down_attention=(False, True),
    up_attention=(True, False),
    sample_size=16,
    norm_num_groups=8,
)
"""What --quick measures: every kind of layer, in a millisecond or two."""

NETWORKS = {"ddpm-cifar10-32": CIFAR, "ddpm-celebahq-256": CELEBA_HQ}
"""By their names at google's."""

TIME = 500
"""The training time at which networks are called."""


def config_of(settings: Settings) -> UNetConfig:
    """Of the network that is asked for."""
    return SMALL if settings.quick else NETWORKS[settings.network]


def network(config: UNetConfig) -> UNet:
    """In eval mode, with PyTorch's random weights everywhere: an untrained `UNet` would predict zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(config).eval()
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return model


def ours(
    model: UNet,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    packed: bool = True,
    own: bool = True,
    fused: bool = True,
    rows: bool = True,
    replayed: bool = True,
    compile: bool = False,
) -> Network:
    """A copy of the model as a run of `Sampler` calls it, at `TIME`; each argument turns a technique off.

    Args:
        packed: convolution weights laid out once for oneDNN (on the CPU, where there is one; not of a
            compiled model, whose weights inductor lays out).
        own: convolutions and linear layers by our own kernels where they are the faster, not oneDNN's alone.
        fused: norms by `ops.group_norm_silu`, else by PyTorch's ops.
        rows: what depends on the time alone is computed before.
        replayed: its ops recorded once, and called without its modules (on the CPU; not of a compiled one).
    """
    device = model.conv_in.weight.device
    packed = packed and device.type == "cpu" and not compile and can_pack(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(model).to(dtype)
    if not packed:
        model = model.to(memory_format=layout)
    packs: Packs = {}
    at = torch.tensor([TIME], device=device)
    with torch.no_grad():
        given = model.time_rows(at) if rows else None
    first = torch.tensor(0, device=device)
    call = model.forward_rows if rows else model
    if compile:
        call = compiled(call)

    def forward(x: Tensor) -> Tensor:
        return call(x, at) if given is None else call(x, given, first)

    if replayed and device.type == "cpu" and not compile:
        forward = Replayed(forward)

    @torch.no_grad()
    def network(x: Tensor, t: int) -> Tensor:
        with ExitStack() as on:
            if packed:
                on.enter_context(packing(packs, low_memory=not own))
            if not fused:
                on.enter_context(plain_ops())
            if compile and device.type == "cpu":
                on.enter_context(torch._inductor.config.patch(freezing=True))
            x = x.to(dtype=dtype, memory_format=layout)
            return forward(x)

    return network
