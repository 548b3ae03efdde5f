"""diffusers: its U-Net eager and compiled, its schedulers, its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.diffusers import diffusers_views, unet_config
from ...unet import UNet
from . import Missing, Network, Peer, compiled, require


def unet(model: UNet) -> nn.Module:
    """The ``UNet2DModel`` that computes what a model without classes does, with a copy of its weights.

    Raises Missing without diffusers.
    """
    require("diffusers")
    from diffusers import UNet2DModel

    weight = model.conv_in.weight
    with weight.device:
        twin = UNet2DModel.from_config(unet_config(model.config))
    twin.load_state_dict(diffusers_views(model))
    return twin.train(model.training)


class Plain(nn.Module):
    """A ``UNet2DModel`` as exporters want it: tensors in, a tensor out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x, t, return_dict=False)[0]


def ddim_run(network: Network, shape: tuple[int, ...], num_steps: int, device: torch.device) -> Callable:
    """``DDIMPipeline.__call__`` around another network, without its pictures and its progress bar."""
    require("diffusers")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()

    @torch.no_grad()
    def run() -> Tensor:
        x = torch.randn(shape, device=device)
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(network(x, t).float(), t, x).prev_sample
        return x

    return run


def pipeline_run(model: UNet, batch: int, num_steps: int) -> Callable[[], Tensor]:
    """``DDIMPipeline`` as it is shipped, to its pictures (B, H, W, C)."""
    twin = unet(model)
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(twin, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: torch.from_numpy(pipeline(batch, num_inference_steps=num_steps, output_type="np").images)


def scheduler_step(method: str, x: Tensor, out: Tensor, num_steps: int, i: int) -> Callable[[], Tensor]:
    """Step ``i`` of so many by the scheduler of "ddpm" or "ddim", which draws its noise itself."""
    require("diffusers")
    import diffusers

    scheduler = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[method]()
    scheduler.set_timesteps(num_steps)
    t = int(scheduler.timesteps[i])
    return lambda: scheduler.step(out, t, x).prev_sample


def ddpm_update(t: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``update(x, out) -> x_next`` of its DDPM scheduler at a time, of 1000 steps."""
    require("diffusers")
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    scheduler.set_timesteps(1000)
    return lambda x, out: scheduler.step(out.float(), t, x).prev_sample


def scheduler_loop(method: str, model: Callable, shape: tuple[int, ...], num_steps: int) -> Callable:
    """A whole run of "ddpm", "ddim" or "dpm_solver", as its pipeline makes it, of any ``model(x, t)``."""
    require("diffusers")
    import diffusers

    scheduler = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpm_solver": diffusers.DPMSolverMultistepScheduler,
    }[method]()

    @torch.no_grad()
    def run() -> Tensor:
        x = torch.randn(shape)
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        return x

    return run


def adding_noise() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``DDPMScheduler.add_noise(x0, noise, t)``."""
    require("diffusers")
    from diffusers import DDPMScheduler

    return DDPMScheduler().add_noise


def _build(
    model: UNet,
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    mode: str | None = None,
    freezing: bool = False,
) -> Network:
    """The U-Net in a dtype and layout; with ``mode``, through ``torch.compile`` in it."""
    graphs = mode in ("reduce-overhead", "max-autotune")
    if graphs and x.device.type != "cuda":
        raise Missing(f"{mode} captures CUDA graphs: it needs a CUDA device")
    if freezing and x.device.type != "cpu":
        raise Missing("freezing is measured on the CPU, where it lays out weights for oneDNN")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    twin = nn.Module.to(unet(model), dtype=dtype, memory_format=layout)  # their own `to` warns of nothing
    call = twin if mode is None else compiled(twin, mode)

    @torch.no_grad()
    def network(x: Tensor, t: int) -> Tensor:
        given = x.to(dtype=dtype, memory_format=layout)
        with torch._inductor.config.patch(freezing=True) if freezing else nullcontext():
            out = call(given, torch.full((), t, device=x.device), return_dict=False)[0]
        return out.clone() if graphs else out  # the next replay overwrites it

    return network


_CONFIGURATIONS: Mapping[str, dict[str, Any]] = {
    "as shipped": {"channels_last": False},
    "channels_last": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "compiled": {"mode": "default"},
    "compiled, frozen": {"mode": "default", "freezing": True},
    "bfloat16, compiled, frozen": {"dtype": torch.bfloat16, "mode": "default", "freezing": True},
    "bfloat16, reduce-overhead": {"dtype": torch.bfloat16, "mode": "reduce-overhead"},
    "bfloat16, max-autotune": {"dtype": torch.bfloat16, "mode": "max-autotune"},
    "max-autotune, frozen": {"mode": "max-autotune-no-cudagraphs", "freezing": True},
    "bfloat16, max-autotune, frozen": {
        "dtype": torch.bfloat16,
        "mode": "max-autotune-no-cudagraphs",
        "freezing": True,
    },
}
PEERS = [
    Peer(
        f"diffusers, {name}",
        options.get("dtype", torch.float32),
        partial(_build, **options),
        compiles="mode" in options,
    )
    for name, options in _CONFIGURATIONS.items()
]
