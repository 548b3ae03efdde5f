"""DDPMPipeline and DDIMPipeline: diffusers' own classes, with the whole loop in `Sampler`.

What is drawn from torch's generators, and in which order, is what diffusers draws: a seed gives the same
picture, and its generator is left in the same state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...noise import CounterNoise, Noise, TorchNoise, default_generator
from ...steps import StepTable
from .networks import Network
from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from .tables import NotATable, step_table

logger = diffusers.utils.logging.get_logger(__name__)

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSOR_INPUTS = ("latents",)
"""What a callback may ask for."""

OUR_SCHEDULERS = {
    diffusers.DDPMScheduler: DDPMScheduler,
    diffusers.DDIMScheduler: DDIMScheduler,
    diffusers.DPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
}


def our_scheduler(scheduler: Any) -> Any:
    """One of these classes of diffusers as ours, with all of its state; anything else as it is."""
    ours = OUR_SCHEDULERS.get(type(scheduler))
    if ours is None:
        return scheduler
    converted = ours.from_config(scheduler.config)
    vars(converted).update(vars(scheduler))
    return converted


@dataclass
class _Asked:
    """What a call asks for, whichever the pipeline: its arguments of these names."""

    batch_size: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    class_labels: Tensor | Sequence[int] | None
    noise: str
    seeds: Sequence[int] | Tensor | None
    dtype: torch.dtype | None
    callback_on_step_end: Callback | None
    callback_on_step_end_tensor_inputs: Sequence[str]

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise TypeError or ValueError, naming the argument; seeds become (B,) int64."""
        B, generator = self.batch_size, self.generator
        if isinstance(generator, Sequence) and len(generator) != B:
            raise ValueError(
                f"generator must be one, or {B}, one an image (batch_size); got {len(generator)}"
            )
        if self.noise not in ("torch", "counter"):
            raise ValueError(f"noise must be 'torch' or 'counter', got {self.noise!r}")
        if self.noise == "counter":
            if generator is not None:
                raise ValueError("generator is for noise='torch'; noise='counter' takes seeds")
            if self.seeds is None or len(self.seeds) != B:
                given = "none" if self.seeds is None else len(self.seeds)
                raise ValueError(f"noise='counter' needs {B} seeds, one an image (batch_size); got {given}")
            seeds = self.seeds.tolist() if isinstance(self.seeds, Tensor) else self.seeds
            self.seeds = torch.stack([ops.as_seed(seed, 1, torch.device("cpu")) for seed in seeds])
        elif self.seeds is not None:
            raise ValueError("seeds are for noise='counter'; noise='torch' takes a generator")
        if self.latents is not None:
            if not isinstance(self.latents, Tensor) or not self.latents.is_floating_point():
                raise TypeError(f"latents must be a floating Tensor, got {type(self.latents).__name__}")
            if tuple(self.latents.shape) != shape:
                raise ValueError(f"latents must have shape {shape}, got {tuple(self.latents.shape)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be None, float32, bfloat16 or float16, got {self.dtype}")
        if unknown := set(self.callback_on_step_end_tensor_inputs) - set(TENSOR_INPUTS):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {list(TENSOR_INPUTS)}, got {sorted(unknown)}"
            )

    def call_back(self, pipe: Any, i: int, latents: Tensor) -> Tensor:
        """The latents that the callback leaves after step i."""
        given = {"latents": latents} if "latents" in self.callback_on_step_end_tensor_inputs else {}
        returned = self.callback_on_step_end(pipe, i, pipe.scheduler.timesteps[i], given)
        if not isinstance(returned, dict):
            raise TypeError(f"callback_on_step_end must return a dict, got {type(returned).__name__}")
        return returned.get("latents", latents)


class _InSampler:
    """What both pipelines have before diffusers' class: the run, and how a folder names their parts."""

    _network: Network | None = None
    _told: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', with our scheduler in place of one that we have."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "scheduler" not in kwargs:
            pipe.scheduler = our_scheduler(pipe.scheduler)
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> Any:
        pipe = super().to(*args, **kwargs)
        if self._network is not None and not self._network.is_of(self.unet):
            self._network = None  # else it would keep the weights where they were
        return pipe

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_network"}

    def _run(
        self,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        asked: _Asked,
        **options: Any,
    ) -> Any:
        """A whole call; ``options`` are what ``scheduler.step`` is given besides the generator."""
        unet, device = self.unet, self._execution_device
        config, size = unet.config, unet.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (asked.batch_size, config.in_channels, *sides)
        if isinstance(asked.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            asked.callback_on_step_end_tensor_inputs = asked.callback_on_step_end.tensor_inputs
        asked.check(shape)
        if asked.dtype == unet.dtype:
            asked.dtype = None
        if asked.class_labels is not None:
            asked.class_labels = torch.as_tensor(asked.class_labels)

        self.scheduler.set_timesteps(num_inference_steps)
        table, clip, because = self._table(options)
        if because is not None:
            for name, given in (("noise='counter'", asked.noise == "counter"), ("dtype", asked.dtype)):
                if given:
                    raise ValueError(f"{name} needs a run that is a table of steps. {because}")
            self._tell(f"this run takes diffusers' steps, one by one. {because}")
        if asked.latents is None and asked.noise == "torch":
            asked.latents = randn_tensor(shape, generator=asked.generator, device=device, dtype=unet.dtype)
        if table is None:
            image = self._loop(asked, options)
        else:
            network = self._load(asked.dtype, table)
            if network.because is not None:
                self._tell(f"the U-Net is not converted and runs as it is. {network.because}")
            image = self._sample(asked, shape, network, table, clip)
        self.maybe_free_model_hooks()

        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type == "pt" or unet.dtype != torch.bfloat16:  # which numpy does not have
            image = image.to(unet.dtype)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        return diffusers.ImagePipelineOutput(images=image) if return_dict else (image,)

    def _table(self, options: dict[str, Any]) -> tuple[StepTable | None, float | None, str | None]:
        """The run as ``(table, clip, None)``, or why `Sampler` cannot run it as ``(None, None, reason)``."""
        device, there, dtype = self._execution_device, self.unet.device, self.unet.dtype
        because = None
        if device != there:
            because = f"The U-Net's weights are on {there} and it runs on {device}"
        elif device.type not in ("cpu", "cuda") or dtype not in DTYPES:
            because = f"The U-Net is {dtype} on {device}"
        if because is None:
            try:
                return *step_table(self.scheduler, **options), None
            except NotATable as error:
                because = f"{type(self.scheduler).__name__}: {error}"
        return None, None, because

    def _load(self, dtype: torch.dtype | None, table: StepTable) -> Network:
        network, self._network = self._network, None  # an old one is freed before a new one is made
        if network is not None and (network.dtype != dtype or not network.is_of(self.unet)):
            network = None
        network = network or Network.of(self.unet, dtype, table)
        network.refresh()
        self._network = network  # which another thread may take
        return network

    def _sample(
        self, asked: _Asked, shape: tuple[int, ...], network: Network, table: StepTable, clip: float | None
    ) -> Tensor:
        device = self._execution_device
        noise: Noise
        if asked.noise == "counter":
            seeds = asked.seeds.to(device)
            noise = CounterNoise(seeds, torch.zeros_like(seeds))
        else:
            generator = default_generator(device) if asked.generator is None else asked.generator
            noise = TorchNoise(generator, self.unet.dtype)

        def callback(i: int, t: int, x: Tensor, x0: Tensor) -> None:
            x.copy_(asked.call_back(self, i, x.clone()))  # a callback may keep it, and x goes on

        return network.sampler.with_table(table, clip)(
            shape=shape[1:],
            batch_size=shape[0],
            x_T=asked.latents,
            noise=noise,
            class_labels=asked.class_labels,
            progress=self.progress_bar,
            callback=None if asked.callback_on_step_end is None else callback,
        )

    def _loop(self, asked: _Asked, options: dict[str, Any]) -> Tensor:
        """diffusers' loop, for what `Sampler` cannot run."""
        device = self._execution_device
        image = asked.latents.to(device, self.unet.dtype)
        labels = {} if asked.class_labels is None else {"class_labels": asked.class_labels.to(device)}
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            out = self.unet(image, t, **labels).sample
            image = self.scheduler.step(out, t, image, generator=asked.generator, **options).prev_sample
            if asked.callback_on_step_end is not None:
                image = asked.call_back(self, i, image)
        return image

    def _tell(self, what: str) -> None:
        """Warn, once a pipeline."""
        if what not in self._told:
            self._told = self._told | {what}
            warnings.warn(f"{type(self).__name__}: {what}", RuntimeWarning, stacklevel=5)


class DDPMPipeline(_InSampler, diffusers.DDPMPipeline):
    """``diffusers.DDPMPipeline``, run by `Sampler`; a scheduler is kept as it is given.

    The U-Net is converted to ours, on the memory of its own weights, and runs in eval mode. One that is not
    converted runs as it is, and a run that is no table of steps (see `step_table`) takes diffusers' steps;
    either is said once, as a RuntimeWarning.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        noise: str = "torch",
        seeds: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS,
    ) -> diffusers.ImagePipelineOutput | tuple:
        """Draw images; the arguments before the star, and what is returned, are diffusers'.

        Args:
            batch_size: how many.
            generator: one, a list of one an image, or None for torch's own.
            num_inference_steps: N.
            output_type: "pil", "np" (float B, H, W, C in [0, 1]) or "pt" (B, C, H, W).
            return_dict: an ``ImagePipelineOutput``, or else ``(images,)``.
            latents: the start, floating (B, C, H, W); None to draw it.
            class_labels: (B,), for a class-conditional U-Net.
            noise: "torch", as diffusers draws; or "counter", by which an image is that of its seed in any
                batch (see `ops.counter_normal`).
            seeds: with noise="counter": one an image.
            dtype: what the U-Net runs in, as a copy; the images are computed in float32 beside it. None: its
                own.
            callback_on_step_end: called after each step as ``callback(pipe, i, t, {"latents": x})``; what it
                returns, a dict, may hold other latents.
            callback_on_step_end_tensor_inputs: what that dict is to hold: "latents" or nothing.

        Raises:
            TypeError, ValueError: an argument that does not fit, before any work; a variance of the scheduler
                with which every picture is NaN; ``dtype`` or noise="counter" for a run that is no table.
        """
        asked = _Asked(
            batch_size,
            generator,
            latents,
            class_labels,
            noise,
            seeds,
            dtype,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self._run(num_inference_steps, output_type, return_dict, asked)


class DDIMPipeline(_InSampler, diffusers.DDIMPipeline):
    """``diffusers.DDIMPipeline``, run by `Sampler`; any scheduler becomes our DDIMScheduler of its config.

    What else differs from diffusers' is said of `DDPMPipeline`.
    """

    def __init__(self, unet: diffusers.UNet2DModel, scheduler: diffusers.DDIMScheduler) -> None:
        super().__init__(unet, scheduler)
        ours = DDIMScheduler.from_config(self.scheduler.config)
        ours.strict = getattr(scheduler, "strict", ours.strict)  # of no config
        self.scheduler = ours

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        noise: str = "torch",
        seeds: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS,
    ) -> diffusers.ImagePipelineOutput | tuple:
        """Draw images; ``eta`` and ``use_clipped_model_output`` are those of ``DDIMScheduler.step``.

        The other arguments, what is returned and what is raised: see `DDPMPipeline`.
        """
        if not 0.0 <= eta <= 1.0:
            logger.warning(f"eta should be in [0, 1], from DDIM to DDPM; got {eta}.")
        asked = _Asked(
            batch_size,
            generator,
            latents,
            class_labels,
            noise,
            seeds,
            dtype,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self._run(
            num_inference_steps,
            output_type,
            return_dict,
            asked,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )
