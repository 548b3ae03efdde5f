"""The images that a model is trained on: from a folder, an npz, a set by name, or a tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .folder import Folder, Tell, find, read

__all__ = ["SETS", "Images", "InMemory", "digits", "load", "s_curve"]

IN_MEMORY = 2**31
"""Bytes up to which images are kept decoded; those of a larger folder are read when their turn comes."""


class Images(Protocol):
    """``shape`` of one; ``take(indices)``: those, float32 (B, *shape) in [-1, 1].

    ``labels`` of all, int64 (N,), and the ``classes``' names, None where there are none.
    ``take_labelled(indices)``: `take`, and their labels (B,).
    """

    shape: tuple[int, ...]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor: ...

    def take_labelled(self, indices: Tensor) -> tuple[Tensor, Tensor]: ...


class InMemory:
    """uint8 (N, C, H, W), or floating (N, ...) as it is to be learned, on the device that trains.

    Raises:
        TypeError, ValueError: of another kind; empty; not finite; labels that are not int64 (N,) from 0 on.
    """

    def __init__(
        self,
        images: Tensor,
        device: torch.device | None = None,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a uint8 or floating Tensor, got {kind}")
        if images.dim() < 2 or images.numel() == 0:
            raise ValueError(f"images must be (N, ...), not empty, got shape {tuple(images.shape)}")
        if images.is_floating_point() and not bool(images.isfinite().all()):
            raise ValueError("images must be finite")
        if labels is not None:
            _check_labels(labels, len(images))
            labels = labels.to(device)
        self.shape, self.labels, self.classes = tuple(images.shape[1:]), labels, classes
        self._images = images.to(device) if images.dtype == torch.uint8 else images.to(device, torch.float32)

    def __len__(self) -> int:
        return len(self._images)

    def take(self, indices: Tensor) -> Tensor:
        chosen = self._images.index_select(0, indices.to(self._images.device, non_blocking=True))
        return _scaled(chosen)

    def take_labelled(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels.index_select(0, indices.to(self.labels.device, non_blocking=True))
        return self.take(indices), labels


class Streamed:
    """Of a folder whose images are too many to keep: decoded by threads when they are taken."""

    def __init__(self, folder: Folder, tell: Tell, threads: int = 8) -> None:
        self.folder, self.shape, self._tell = folder, folder.shape, tell
        self.labels = None if folder.labels is None else torch.tensor(folder.labels)
        self.classes = folder.classes
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.folder.files)

    def take(self, indices: Tensor) -> Tensor:
        return self._decoded(indices)[0]

    def take_labelled(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, taken = self._decoded(indices)
        return images, self.labels[taken]

    def _decoded(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        found = self._pool.map(lambda k: self.folder.image_or_next(k, self._tell), indices.tolist())
        images, taken = zip(*found, strict=True)
        return _scaled(torch.from_numpy(np.stack(images))), torch.tensor(taken)


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _check_labels(labels: Tensor, count: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
        given = (
            f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise TypeError(f"labels must be an int64 Tensor of shape ({count},), one an image, got {given}")
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be at least 0, got {int(labels.min())}")


def load(
    source: str,
    *,
    channels: int,
    size: tuple[int, int] | None,
    crop: bool,
    strict: bool,
    labelled: bool,
    device: torch.device,
    tell: Tell,
) -> Images:
    """The images of a `Config`'s ``data``.

    Args:
        source: a folder, an ``.npz``, or one of `SETS`.
        channels: 1, 3 or 4, to which a folder's images are converted.
        size: (height, width) of the network, None for any.
        crop: see `Config`.
        strict: a file that cannot be read is an error. Else it is named, and left out.
        labelled: whether labels are wanted: of a folder of folders, one a class, in the order of their names;
            an npz's ``labels``, or ``arr_1`` as OpenAI's have it; a set's own.
        tell: takes what there is to say of such files.

    Raises:
        FileNotFoundError: there is no such source, or a folder without images.
        ValueError: images of more than one size, or of another than the network's, unless they are cropped;
            a damaged npz; with ``strict``, a file that cannot be read; with ``labelled``, no labels.
        ImportError: a set whose library is not installed.
    """
    if source in SETS:
        images, labels = SETS[source]()
        if labelled and labels is None:
            raise ValueError(f"data: {source!r} has no labels, which a network with classes learns from")
        return InMemory(images, device, labels if labelled else None)
    path = Path(source)
    if path.suffix.lower() == ".npz":
        return InMemory(*_npz(path, labelled, device))
    if not source or not path.is_dir():
        sets = ", ".join(map(repr, SETS))
        given = f"{source!r} is neither a folder nor an .npz" if source else "none was given"
        raise FileNotFoundError(f"data: {given}; allowed: a folder of images, FILE.npz, or {sets}")
    folder = find(path, channels=channels, size=size, crop=crop, strict=strict, labelled=labelled, tell=tell)
    if len(folder.files) * int(np.prod(folder.shape)) > IN_MEMORY:
        return Streamed(folder, tell)
    images, labels = read(folder, tell)
    return InMemory(images, device, labels, folder.classes)


def _npz(path: Path, labelled: bool, device: torch.device) -> tuple[Tensor, torch.device, Tensor | None]:
    """Its only array, or ``arr_0``: uint8 (N, H, W, C) or (N, H, W), as OpenAI's are; floating as it is.

    And the integers of ``labels``, or ``arr_1``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = arrays.files[0] if len(arrays.files) == 1 else "arr_0"
            if name not in arrays.files:
                raise ValueError(f"it has {', '.join(arrays.files) or 'no arrays'}, and no arr_0")
            array = arrays[name]
            kept = next((arrays[name] for name in ("labels", "arr_1") if labelled and name in arrays), None)
    except (ValueError, BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"data: {path} cannot be read: {error}") from error
    labels = None
    if labelled:
        if kept is None or kept.dtype.kind not in "iu" or kept.shape != array.shape[:1]:
            given = "none" if kept is None else f"{kept.dtype} {kept.shape}"
            raise ValueError(
                f"data: {path} must hold labels, or arr_1: integers ({len(array)},), one an image, for a "
                f"network with classes; got {given}"
            )
        labels = torch.from_numpy(kept.astype(np.int64))
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        array = array[..., None] if array.ndim == 3 else array
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))), device, labels
    if array.dtype.kind != "f":
        raise ValueError(
            f"data: {path} must hold uint8 (N, H, W, C), or floating (N, C, H, W) in [-1, 1]; "
            f"got {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array), device, labels


# Sets by name


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 real handwritten digits: four fifths to train on, one held out.

    ((images, labels), (images, labels)); images float32 (n, 1, 8, 8) in [-1, 1], labels int64 (n,).
    """
    datasets, selection = _sklearn("datasets"), _sklearn("model_selection")
    found = datasets.load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target)
    split = selection.train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (split[0], split[2]), (split[1], split[3])


def s_curve(seed: int | None = 0, count: int = 10**4) -> Tensor:
    """The tutorial's points, (count, 2) float32."""
    points, _ = _sklearn("datasets").make_s_curve(count, noise=0.1, random_state=seed)
    return torch.tensor(points[:, [0, 2]] / 10, dtype=torch.float32)


def _sklearn(name: str) -> Any:
    try:
        return import_module(f"sklearn.{name}")
    except ImportError as error:
        raise ImportError("this set needs scikit-learn: pip install 'ddpm_fast[examples]'") from error


SETS: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
    "digits": lambda: digits()[0],
    "s-curve": lambda: (s_curve(), None),
}
