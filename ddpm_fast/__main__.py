"""``python -m ddpm_fast``."""

from .cli import main

main()
