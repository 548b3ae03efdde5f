"""A folder of images of any format that Pillow reads: found, looked at, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

__all__ = ["Folder", "Tell", "find", "read"]

Tell = Callable[[str], None]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NAMED = 10  # of the files that cannot be read; the rest are counted


class Unreadable(Exception):
    """A file that is no image, or damaged."""


@dataclass(frozen=True)
class Folder:
    """
    Attributes:
        files: in the order of their names, which is that of the indices.
        shape: (C, H, W), what each is decoded to.
        crop: whether images of other sizes are made to fit.
        strict: whether a file that cannot be decoded is an error.
        labels: of each file, where they were asked for: its place in `classes`.
        classes: names of the folders just below the one that was searched, in order.
    """

    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    crop: bool
    strict: bool
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None

    def image(self, k: int) -> np.ndarray:
        """uint8 ``shape``. Raises Unreadable."""
        channels, height, width = self.shape
        try:
            with Image.open(self.files[k]) as opened:
                image = ImageOps.exif_transpose(opened).convert(MODES[channels])
        except Exception as error:  # a decoder of Pillow's raises anything
            raise Unreadable(f"{self.files[k]}: {error}") from error
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)

    def image_or_next(self, k: int, tell: Tell) -> tuple[np.ndarray, int]:
        """Image k, and k; in place of one that is damaged, the next that is not. With strict a ValueError."""
        for j in range(k, k + len(self.files)):
            j %= len(self.files)
            try:
                return self.image(j), j
            except Unreadable as error:
                if self.strict:
                    raise ValueError(f"data: cannot be read: {error}") from error
                tell(f"left out, since it cannot be read: {error}")
        raise ValueError("data: none of the images can be read")


def find(
    path: Path,
    *,
    channels: int,
    size: tuple[int, int] | None,
    crop: bool,
    strict: bool,
    labelled: bool,
    tell: Tell,
) -> Folder:
    """Every image below a folder, by its name's ending; each is opened for its size. See `data.load`."""
    if channels not in MODES:
        raise ValueError(f"data: images have 1, 3 or 4 channels, the network has {channels}: give an .npz")
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise FileNotFoundError(f"data: {path} holds no images (of the formats that Pillow reads)")
    classes = _classes(path, files) if labelled else None
    with ThreadPoolExecutor(8) as pool:
        sizes = dict(zip(files, pool.map(_size, files), strict=True))
    _tell_unreadable([found for found in sizes.values() if isinstance(found, str)], strict, tell)
    sizes = {file: found for file, found in sizes.items() if not isinstance(found, str)}
    if not sizes:
        raise FileNotFoundError(f"data: of the {len(files)} images in {path} none can be read")
    first, (height, width) = next(iter(sizes.items()))
    wanted = size or (height, width)
    for file, (height, width) in sizes.items():
        if (height, width) != wanted and not crop:
            what = "the network's size is" if size else f"{first.name} is"
            raise ValueError(
                f"data: {file} is {width} x {height} (width x height), {what} {wanted[1]} x {wanted[0]}: "
                "with crop=true images are made to fit"
            )
    found = Folder(tuple(sizes), (channels, *wanted), crop, strict)
    if classes is None:
        return found
    labels = tuple(classes.index(file.relative_to(path).parts[0]) for file in found.files)
    return replace(found, labels=labels, classes=classes)


def _classes(path: Path, files: list[Path]) -> tuple[str, ...]:
    for file in files:
        if file.parent == path:
            raise ValueError(
                f"data: {file} is of no class: a network with classes takes folders of images, one a class"
            )
    return tuple(sorted({file.relative_to(path).parts[0] for file in files}))


def read(folder: Folder, tell: Tell) -> tuple[Tensor, Tensor | None]:
    """All that can be decoded, uint8 (N, C, H, W), and its labels, int64 (N,)."""

    def decoded(k: int) -> np.ndarray | str:
        try:
            return folder.image(k)
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoded, range(len(folder.files))))
    _tell_unreadable([image for image in found if isinstance(image, str)], folder.strict, tell)
    images = [image for image in found if not isinstance(image, str)]
    if not images:
        raise FileNotFoundError(f"data: of the {len(found)} images none can be read")
    labels = None
    if folder.labels is not None:
        pairs = zip(found, folder.labels, strict=True)
        labels = torch.tensor([label for image, label in pairs if not isinstance(image, str)])
    return torch.from_numpy(np.stack(images)), labels


def _size(file: Path) -> tuple[int, int] | str:
    """(height, width) as it is looked at; of a file that cannot be opened, why."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Not PNG's own, which decodes the whole image to look behind it.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # a decoder of Pillow's raises anything
        return f"{file}: {error}"
    return (width, height) if turned else (height, width)


def _tell_unreadable(reasons: list[str], strict: bool, tell: Tell) -> None:
    if not reasons:
        return
    if strict:
        raise ValueError(f"data: {len(reasons)} cannot be read: {'; '.join(_some(reasons))}")
    for reason in _some(reasons):
        tell(f"left out, since it cannot be read: {reason}")
    tell(f"{len(reasons)} of the files were left out")


def _some(reasons: list[str]) -> Iterator[str]:
    yield from reasons[:NAMED]
    if len(reasons) > NAMED:
        yield f"and {len(reasons) - NAMED} more"
