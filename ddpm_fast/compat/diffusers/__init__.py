"""diffusers' names, faster: import them from here in place of ``from diffusers import ...``."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ddpm_fast.compat.diffusers needs diffusers, an optional extra: pip install ddpm_fast[diffusers]"
    ) from error

from .accelerate import accelerate
from .pipelines import DDIMPipeline, DDPMPipeline
from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from .verify import verify

__all__ = [
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "accelerate",
    "verify",
]
