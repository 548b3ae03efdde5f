"""OpenAI's improved-diffusion: import from here in place of ``improved_diffusion``."""
