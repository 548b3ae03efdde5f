"""A run's checkpoints: folders that are there whole or not at all, of which the last few are kept.

    checkpoints/00001000/config.json, model.safetensors    as `checkpoint.save` writes them: the first average
                         training.json                     the update, the config, what it was trained on
                         training.safetensors              weights, the optimizer's state, other averages,
                                                           the losses by which times are drawn

Of a model that is not a `UNet` there is no config.json. Nothing is a pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint, files
from ..losses import SecondMomentSampler
from ..schedule import Schedule
from ..unet import UNet
from .config import Config
from .ema import Ema
from .folder import Tell

__all__ = ["Members", "State", "load", "newest", "numbers", "read"]

FORMAT, VERSION = "ddpm_fast training", 1


@dataclass(frozen=True)
class Members:
    """All that changes in a run. `averages` may be empty; `times` is what learns how to draw them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: tuple[Ema, ...]
    times: SecondMomentSampler | None = None

    @property
    def result(self) -> nn.Module:
        """What is sampled from: the first average, or the model itself."""
        return self.averages[0].model if self.averages else self.model

    def tensors(self) -> dict[str, Tensor]:
        """Those that do not stand in model.safetensors, by name; the very ones that training changes."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found = {}
        if self.averages:
            found |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for k, average in enumerate(self.averages[1:], 1):
            found |= {f"ema.{k}.{name}": value for name, value in average.model.state_dict().items()}
        if self.times is not None:
            found |= {f"times.{name}": value for name, value in self.times.state_dict().items()}
        for parameter, state in self.optimizer.state.items():
            found |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
        return found

    def nbytes(self) -> int:
        """Of a checkpoint: weights, averages, and Adam's two moments."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return weights * (len(self.averages) + 3)


@dataclass(frozen=True)
class State:
    """What was read: of `training.json`, and the tensors of both files."""

    folder: Path
    info: dict[str, Any]
    result: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def update(self) -> int:
        return self.info["update"]

    @torch.no_grad()
    def restore(self, members: Members) -> None:
        """Into the tensors that are there. Raises ValueError, before any change, for another model's."""
        result = {name: v for name, v in self.result.items() if not name.startswith("schedule.")}
        targets = {f"result.{name}": value for name, value in members.result.state_dict().items()}
        sources = {f"result.{name}": value for name, value in result.items()} | self.tensors
        targets |= {name: v for name, v in members.tensors().items() if not name.startswith("optimizer.")}
        state = {name: value for name, value in sources.items() if name.startswith("optimizer.")}
        for name in targets.keys() | (sources.keys() - state.keys()):
            a, b = (part[name].shape if name in part else None for part in (targets, sources))
            if a != b:
                told = f"{name} was {_shape(b)}, is {_shape(a)}"
                raise ValueError(f"{self.folder} is of another model: {told}")
        for name, value in targets.items():
            value.copy_(sources[name])
        parameters = dict(members.model.named_parameters())
        members.optimizer.state.clear()
        for path, value in state.items():
            name, _, key = path.removeprefix("optimizer.").rpartition(".")
            parameter = parameters[name]
            # A moment has its parameter's layout; the count of updates is on the device, for fused kernels.
            like = parameter if value.shape == parameter.shape else value.to(parameter.device)
            made = torch.empty_like(like, dtype=value.dtype).copy_(value)
            members.optimizer.state[parameter][key] = made


def save(
    folder: Path,
    members: Members,
    *,
    update: int,
    keep: int,
    config: Config,
    schedule: Schedule,
    info: dict[str, Any],
) -> Path:
    """Write ``folder``/update, then let go of those before the last ``keep``. Raises OSError."""
    made = folder / f"{update:08}"
    with files.written_whole(made) as new:
        if isinstance(members.result, UNet):
            checkpoint.write(new, members.result, schedule, config.settings())
        else:
            checkpoint.write_tensors(new / "model.safetensors", members.result.state_dict())
        checkpoint.write_tensors(new / "training.safetensors", members.tensors())
        content = {"format": FORMAT, "version": VERSION, "update": update, **info}
        content["config"] = config.to_dict()
        files.write_json(new / "training.json", content)
    for number in numbers(folder)[:-keep]:
        old = folder / f"{number:08}"
        gone = old.with_name(f".{old.name}.old")  # half of it must not look like a checkpoint
        old.rename(gone)
        shutil.rmtree(gone)
    return made


def numbers(folder: Path) -> list[int]:
    """The updates after which there is a checkpoint, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def newest(folder: Path, tell: Tell) -> State | None:
    """The last that can be read; None where there is none. What a killed process left half written goes."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and path.suffix in (".new", ".old"):
                shutil.rmtree(path)
    for number in reversed(numbers(folder)):
        try:
            return read(folder / f"{number:08}")
        except (OSError, ValueError) as error:
            tell(f"left out, since it cannot be read: {error}")
    return None


def read(folder: Path) -> State:
    """Raises FileNotFoundError or ValueError for a folder that is no checkpoint, or damaged."""
    try:
        info = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if info.get("format") != FORMAT or info.get("version") != VERSION:
            given = f"{info.get('format')!r}, version {info.get('version')!r}"
            raise ValueError(f"it is {given}, this ddpm_fast reads {FORMAT!r}, version {VERSION}")
        tensors = [load_file(folder / f"{name}.safetensors") for name in ("model", "training")]
    except (ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return State(folder, info, *tensors)


def load(folder: str | Path) -> tuple[nn.Module, Schedule, dict[str, Any]]:
    """The model of a checkpoint of a `Config`, whatever network it has, as `checkpoint.load` gives a U-Net's.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or a damaged one; a model that the config does not make.
    """
    state = read(Path(folder))
    config = Config.from_dict(state.info["config"])
    model = config.make_model()
    weights = {name: v for name, v in state.result.items() if not name.startswith("schedule.")}
    model.load_state_dict(weights)
    return model.eval(), config.make_schedule(), config.settings()


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
