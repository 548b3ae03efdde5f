"""A training step: noise, forward, backward and the optimizer; ours beside plain PyTorch and the peers.

"ours" is `Trainer`'s update as a user gets it, with all that is around it: the batch drawn from the images,
the rate set, what is drawn seeded. It has no average of the weights, as the others have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..compat.peers import attempt, compiled, denoising_diffusion, diffusers
from ..schedule import Schedule
from ..training import Config, OptimizerConfig, Trainer
from ..unet import UNet
from . import arms, plain
from .measure import Case, Run
from .networks import config_of, network
from .report import Table
from .sampling import called
from .settings import Settings

Loss = Callable[[Tensor], Tensor]
"""``loss(images)``: of one batch, with its times and noise drawn inside."""


def cases(settings: Settings) -> Iterator[Case]:
    """A batch in float32, and with bfloat16 by autocast; AdamW in one kernel for every arm."""
    batches = (8,) if settings.device.type == "cpu" else (64, 128)
    for batch in (2,) if settings.quick else batches:
        for dtype in (torch.float32, torch.bfloat16):
            labels = {"batch": batch, "dtype": str(dtype).removeprefix("torch.")}
            make = partial(_arm, settings, batch, dtype)
            builds = {"ours": partial(_trainer, settings, batch, dtype)}
            builds |= {name: partial(make, name, build) for name, build in OURS.items()}
            builds |= {name: partial(attempt, partial(make, name, build)) for name, build in PEERS.items()}
            yield Case(labels, builds, calls=batch)


def table(settings: Settings) -> Table:
    title = f"A training step of {called(settings)}: noise, forward, backward, AdamW; an image"
    return arms.table(settings, "training", title, list(cases(settings)), rounds=10, base="ours")


LR = 1e-5
IMAGES = 256


def _trainer(settings: Settings, batch: int, dtype: torch.dtype) -> Run:
    settings.check("ours")
    model = network(config_of(settings))
    config = Config(
        updates=2**31,
        batch=batch,
        precision=str(dtype).removeprefix("torch."),
        ema=(),
        optimizer=OptimizerConfig(lr=LR),
    )
    images = torch.randn(IMAGES, *model.sample_shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    folder = TemporaryDirectory()
    trainer = Trainer(config, folder.name, device=settings.device, model=model, images=images, bar=False)
    updates = trainer.updates()

    def step(folder: TemporaryDirectory = folder) -> Tensor:  # which goes with the arm
        with torch.enable_grad():
            next(updates)
        return trainer.loss

    return step


def _arm(
    settings: Settings,
    batch: int,
    dtype: torch.dtype,
    name: str,
    build: Callable[[UNet], tuple[nn.Module, Loss]],
) -> Run:
    settings.check(name, compiles="compiled" in name)
    model = network(config_of(settings)).train().to(settings.device)
    shape = (batch, *model.sample_shape)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings.device).clamp(-1, 1)
    module, loss = build(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    autocast = torch.autocast(settings.device.type, dtype) if dtype != torch.float32 else nullcontext()

    def step() -> Tensor:
        with torch.enable_grad():
            with autocast:
                value = loss(images)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def _our_loss(
    model: UNet, *, fused: bool, channels_last: bool, compile: bool = False
) -> tuple[nn.Module, Loss]:
    device = model.conv_in.weight.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    call = compiled(model) if compile else model
    table = Schedule.linear().tensor(device)
    seed = torch.tensor(0, device=device)

    def loss(images: Tensor) -> Tensor:
        t = torch.randint(0, len(table), images.shape[:1], device=device)
        if fused:
            x_t, noise = ops.q_sample_counter(
                images, t, table, seed, torch.arange(len(images), device=device)
            )
            return F.mse_loss(call(x_t.contiguous(memory_format=layout), t), noise)
        noise = torch.randn_like(images)
        x_t = plain.q_sample(images, noise, t, table)
        with plain.plain_ops():
            return F.mse_loss(call(x_t.contiguous(memory_format=layout), t), noise)

    return model, loss


def _diffusers_loss(model: UNet, *, channels_last: bool, compile: bool = False) -> tuple[nn.Module, Loss]:
    """As its example ``train_unconditional.py`` does it."""
    twin = diffusers.unet(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    nn.Module.to(twin, memory_format=layout)
    call = compiled(twin) if compile else twin
    add_noise = diffusers.adding_noise()

    def loss(images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        t = torch.randint(0, 1000, images.shape[:1], device=images.device)
        x_t = add_noise(images, noise, t).contiguous(memory_format=layout)
        return F.mse_loss(call(x_t, t, return_dict=False)[0], noise)

    return twin, loss


def _denoising_diffusion_loss(model: UNet) -> tuple[nn.Module, Loss]:
    diffusion = denoising_diffusion.training(model.config).to(model.conv_in.weight.device)
    return diffusion, lambda images: diffusion((images + 1) / 2)  # it takes images in [0, 1]


OURS = {
    "our modules": partial(_our_loss, fused=True, channels_last=True),
    "our modules, NCHW": partial(_our_loss, fused=True, channels_last=False),
    "our modules, compiled": partial(_our_loss, fused=True, channels_last=True, compile=True),
    "our modules, plain PyTorch": partial(_our_loss, fused=False, channels_last=False),
    "our modules, plain PyTorch, channels_last": partial(_our_loss, fused=False, channels_last=True),
}
PEERS = {
    "diffusers": partial(_diffusers_loss, channels_last=False),
    "diffusers, channels_last": partial(_diffusers_loss, channels_last=True),
    "diffusers, compiled": partial(_diffusers_loss, channels_last=True, compile=True),
    "denoising-diffusion-pytorch": _denoising_diffusion_loss,
}
