"""improved-diffusion's ``nn``: the same as guided-diffusion's."""

from ..guided_diffusion.nn import mean_flat, scale_module, timestep_embedding, update_ema, zero_module

__all__ = ["mean_flat", "scale_module", "timestep_embedding", "update_ema", "zero_module"]
