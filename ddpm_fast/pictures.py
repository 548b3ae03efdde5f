"""Images to files: one grid, a folder of PNGs, or an npz. A file is written whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from . import files

FORMATS = ("png-grid", "png-dir", "npz")
SMALLEST_TILE = 32


def check_writable(out: Path, form: str) -> None:
    """Refuse, before any work, a place that `write` could not write to. Makes the folders that are missing.

    Raises:
        OSError: `out`, or its folder, cannot be written.
    """
    if out.is_dir() != (form == "png-dir") and out.exists():
        kind = "a folder" if form == "png-dir" else "a file"
        raise FileExistsError(f"{out} exists and is not {kind}, which format {form!r} writes")
    files.check_folder(out if form == "png-dir" else out.parent)


def check_png(option: str, out: Path) -> None:
    """Raises ValueError for a picture that does not end in .png; OSError as `check_writable`."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"{option} {out} must end in .png")
    check_writable(out, "png-grid")


def check_channels(channels: int, form: str) -> None:
    """Raises ValueError for a number of channels that PNG does not have."""
    if form != "npz" and channels not in (1, 3, 4):
        raise ValueError(f"a PNG has 1, 3 or 4 channels, not {channels}: use format 'npz'")


def write(images: Tensor, out: Path, form: str, first: int = 0, columns: int | None = None) -> None:
    """Write uint8 ``(N, C, H, W)``.

    "png-grid" is one picture, ``columns`` wide, small images enlarged without smoothing; "png-dir" a picture
    each as it is, named by its index from ``first`` on, as 000000.png;
    "npz" ``arr_0`` uint8 (N, H, W, C), as OpenAI's image_sample.py writes it.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    if form == "npz":
        files.replace(out, lambda file: np.savez(file, pixels))
    elif form == "png-dir":
        for k, image in enumerate(pixels, first):
            files.replace(out / f"{k:06}.png", lambda file, image=image: picture(image).save(file, "PNG"))
    else:
        files.replace(out, lambda file: picture(grid(pixels, columns)).save(file, "PNG"))


def picture(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 with 1, 3 or 4 channels as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(pixels: np.ndarray, columns: int | None = None) -> np.ndarray:
    """(N, H, W, C) uint8 as one picture, ``columns`` wide or near-square, a light line between tiles."""
    count, height, width, channels = pixels.shape
    zoom = max(1, math.ceil(SMALLEST_TILE / max(height, width)))
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = height * zoom, width * zoom
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 2
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 200, dtype=np.uint8
    )
    for k, tile in enumerate(pixels):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet
