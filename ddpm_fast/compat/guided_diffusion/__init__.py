"""OpenAI's guided-diffusion: import from here in place of ``guided_diffusion``."""
