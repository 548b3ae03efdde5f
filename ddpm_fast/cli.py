"""``ddpm-fast sample | info``: from a checkpoint to pictures, without a line of Python."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import checkpoint, pictures
from .info import info as gather_info
from .sampler import METHODS, Sampler, to_uint8

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
SUFFIXES = {".png": "png-grid", ".npz": "npz", "": "png-dir"}
DEFAULT_OUT = {"png-grid": "samples.png", "png-dir": "samples", "npz": "samples.npz"}


@app.callback()
def ddpm_fast() -> None:
    """Fast, exact sampling of denoising diffusion models."""


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


@app.command()
def sample(
    folder: Annotated[
        Path, _option("Folder of ddpm_fast's or diffusers'; default: the bundled digits.", "--checkpoint")
    ] = checkpoint.DIGITS,
    method: Annotated[str | None, _option(f"{' | '.join(METHODS)}; default: the checkpoint's.")] = None,
    steps: Annotated[int | None, _option("Model calls; default: 50 of ddim, 20 of dpm_solver, T.")] = None,
    n: Annotated[int, _option("Number of images; default: 64.")] = 64,
    seed: Annotated[int, _option("64 bits; image k of a seed is always the same; default: 0.")] = 0,
    first_image: Annotated[int, _option("Index of the first image; default: 0.")] = 0,
    batch: Annotated[int, _option("Images at a time; default: 64.")] = 64,
    device: Annotated[str | None, _option("Default: cuda if there is one, else cpu.")] = None,
    out: Annotated[Path | None, _option("Default: samples.png, samples/ or samples.npz.")] = None,
    form: Annotated[
        str | None, _option(f"{' | '.join(pictures.FORMATS)}; default: by --out's ending.", "--format")
    ] = None,
) -> None:
    """Sample images and write them; says where, and how fast."""
    if form is None:
        form = "png-grid" if out is None else SUFFIXES.get(out.suffix.lower())
        if form is None:
            raise ValueError(f"--out {out} does not say its format: end it in .png or .npz, or give --format")
    if form not in pictures.FORMATS:
        raise ValueError(f"--format {form!r} is not known; allowed: {', '.join(pictures.FORMATS)}")
    for name, value, least in (("--n", n, 1), ("--batch", batch, 1), ("--first-image", first_image, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    out = Path(DEFAULT_OUT[form]) if out is None else out
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    model, schedule, settings = checkpoint.load(folder)
    settings = _settings(settings, method) | ({} if steps is None else {"num_steps": steps})
    sampler = Sampler(model.to(device), schedule, **settings)
    pictures.check_channels(model.sample_shape[0], form)
    pictures.check_writable(out, form)

    start = time.perf_counter()
    images = []
    for first in range(0, n, batch):
        size = min(batch, n - first)
        x = sampler(size, seed=seed, first_image=first_image + first, progress=True)
        images.append(to_uint8(x).cpu())
    seconds = time.perf_counter() - start
    pictures.write(torch.cat(images), out, form, first_image)
    kind = f"{sampler.table.method}, {len(sampler.table)} steps, {device}"
    typer.echo(f"{out}: {n} images in {seconds:.2f} s, {n / seconds:.1f} images/s ({kind})")


@app.command()
def info() -> None:
    """Versions, devices, the compiled library, and the backend of each op with its reason."""
    for name, value in gather_info().items():
        if isinstance(value, dict):
            value = [f"{key}: {text}" for key, text in value.items()]
        if isinstance(value, list):
            value = "".join(f"\n  {line}" for line in value)
        typer.echo(f"{name}: {value}")


def _settings(settings: dict[str, Any], method: str | None) -> dict[str, Any]:
    """The checkpoint's settings for a method: all for its own, for another what belongs to the model."""
    if method is None or method == settings.get("method", "ddpm"):
        return settings
    return {k: settings[k] for k in ("prediction", "clip", "variance") if k in settings} | {"method": method}


def main() -> None:
    """Entry point: a mistake of the user's is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
