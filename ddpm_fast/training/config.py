"""What a training run is made of: a dataclass, its TOML, and the presets that come with the package."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..losses import Loss
from ..sampler import Sampler
from ..schedule import Schedule, check_int, check_number
from ..unet import UNet, UNetConfig
from .points import EmbeddingMLP, MLPConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["PRESETS", "Config", "OptimizerConfig"]

_PRESETS = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(file.stem for file in _PRESETS.glob("*.toml")))

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas")
FREE = ("updates", "data", "checkpoint_every", "keep", "sample_every", "samples", "log_every", "sampling")
"""What a run that is resumed may change: where the images lie, how long, and what is written when."""


@dataclass(frozen=True)
class OptimizerConfig:
    """
    Attributes:
        name: "adam" or "adamw".
        lr, betas, weight_decay: torch's.
        warmup: updates over which the rate rises linearly from 0.
        decay: "constant", or "cosine" from lr at the start to 0 at the last update.
        clip: bound of the norm of all gradients together, None for no clip.
    """

    name: str = "adamw"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"
    clip: float | None = None

    def __post_init__(self) -> None:
        _choice("optimizer.name", self.name, ("adam", "adamw"))
        _choice("optimizer.decay", self.decay, ("constant", "cosine"))
        _number(self, "lr", lambda v: 0 < v < math.inf, "finite and above 0", "optimizer.")
        _number(self, "weight_decay", lambda v: 0 <= v < math.inf, "finite and at least 0", "optimizer.")
        check_int("optimizer.warmup", self.warmup, 0)
        if self.clip is not None:
            _number(self, "clip", lambda v: v > 0, "above 0", "optimizer.")
        _tuple_of_rates(self, "betas", "optimizer.")
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas must be two numbers, got {list(self.betas)}")

    def rate(self, update: int, updates: int) -> float:
        """The learning rate of update 0, 1, ... of ``updates``."""
        rate = self.lr * min(1.0, (update + 1) / self.warmup) if self.warmup else self.lr
        return rate * (0.5 * (1 + math.cos(math.pi * update / updates)) if self.decay == "cosine" else 1.0)


@dataclass(frozen=True)
class Config:
    """A training run. `read`, `preset` and `from_dict` make one; `to_toml` writes what `read` takes.

    Attributes:
        data: a folder of images (searched whole, any format that Pillow reads), an ``.npz``, or one of the
            sets "digits" and "s-curve", which need scikit-learn. For a network with ``num_class_embeds`` with
            labels, see `data.load`.
        updates: of the optimizer, in all.
        batch: images an update, over all processes.
        accumulate: parts of the batch, one after the other, whose gradients are added up.
        seed: of weights, order, times, noise, flips and dropout.
        precision: "float32", or "bfloat16": the forward pass under autocast.
        compile: one compiled graph an update, see `TrainStep`. "auto": on the CPU for the MLP, where there is
            a C++ compiler.
        times: how t is drawn: "uniform", "antithetic", or "second_moment", in proportion to the root mean
            square of its last losses (see `losses.SecondMomentSampler`).
        label_dropout: the probability that an image is given to a network with classes without its own, as of
            class ``num_class_embeds - 1``, which is then none of the data's: for classifier-free guidance (Ho
            & Salimans 2022, arXiv 2207.12598).
        flip: mirror every other image left to right, at random.
        crop: images of other sizes are shrunk or enlarged to cover the network's, and cut about the centre.
            False: they are an error.
        ema: rates of the averages of the weights. The first is what is sampled from, and saved as the model.
        checkpoint_every, keep: updates between checkpoints, and how many of the last are kept.
        sample_every, samples: updates between pictures of so many samples; 0: none but at the end.
        log_every: updates between lines of the log. A loss that is not finite is found then.
        unet: see `UNetConfig`; or
        mlp: see `MLPConfig`, for points. With neither, `Trainer` is given the model.
        schedule: ``kind``, one of the constructors of `Schedule`, and its arguments.
        loss: arguments of `Loss`.
        optimizer: see `OptimizerConfig`.
        sampling: arguments of `Sampler`, for the pictures and in the checkpoint; a clip of inf is none.

    Raises:
        TypeError, ValueError: naming the key, what was given and what is allowed.
    """

    data: str = ""
    updates: int = 100_000
    batch: int = 128
    accumulate: int = 1
    seed: int = 0
    precision: str = "float32"
    compile: bool | str = "auto"
    times: str = "uniform"
    label_dropout: float = 0.0
    flip: bool = False
    crop: bool = False
    ema: tuple[float, ...] = (0.9999,)
    checkpoint_every: int = 1000
    keep: int = 3
    sample_every: int = 1000
    samples: int = 64
    log_every: int = 50
    unet: UNetConfig | None = None
    mlp: MLPConfig | None = None
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"kind": "linear"})
    loss: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"updates": 1, "batch": 1, "accumulate": 1, "checkpoint_every": 1, "keep": 1}
        for name, low in (least | {"sample_every": 0, "samples": 1, "log_every": 1}).items():
            check_int(name, getattr(self, name), low)
        check_int("seed", self.seed, 0, 2**63 - 1)
        _choice("precision", self.precision, ("float32", "bfloat16"))
        _choice("compile", self.compile, (True, False, "auto"))
        _choice("times", self.times, ("uniform", "antithetic", "second_moment"))
        if self.times == "second_moment" and self.compile is True:
            raise ValueError("times='second_moment' learns from each loss: compile must be 'auto' or false")
        _number(self, "label_dropout", lambda p: 0 <= p < 1, "in [0, 1)")
        for name in ("flip", "crop"):
            _choice(name, getattr(self, name), (True, False))
        if not isinstance(self.data, str):
            raise TypeError(f"data must be a string, got {self.data!r}")
        _tuple_of_rates(self, "ema")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate={self.accumulate}, got {self.batch}")
        if self.unet is not None and self.mlp is not None:
            raise ValueError("a config has [unet] or [mlp], not both")
        embeds = None if self.unet is None else self.unet.num_class_embeds
        if self.label_dropout and (self.unet or self.mlp) and (embeds is None or embeds < 2):
            raise ValueError(
                "label_dropout needs unet.num_class_embeds, of the data's classes and one more; "
                f"got {'none' if embeds is None else embeds}"
            )
        if not isinstance(self.schedule, Mapping):
            raise TypeError(f"[schedule] must be a table of keys, got {self.schedule!r}")
        _choice("schedule.kind", self.schedule.get("kind"), SCHEDULES)
        make = getattr(Schedule, self.schedule["kind"])
        _known("schedule", {k: v for k, v in self.schedule.items() if k != "kind"}, _arguments(make))
        _known("loss", self.loss, _arguments(Loss) - {"schedule", "device", "dtype"})
        of_run = {"model", "schedule", "prediction", "variance", "dtype", "compile", "channels_last", "graph"}
        _known("sampling", self.sampling, _arguments(Sampler) - of_run)
        learned = self.make_loss().variance == "learned_range"
        if self.unet is not None and self.unet.out_channels != self.unet.in_channels * (1 + learned):
            raise ValueError(
                f"unet.out_channels must be {self.unet.in_channels * (1 + learned)}: "
                f"{'twice ' if learned else ''}in_channels, got {self.unet.out_channels}"
            )

    def make_schedule(self) -> Schedule:
        arguments = {name: value for name, value in self.schedule.items() if name != "kind"}
        return getattr(Schedule, self.schedule["kind"])(**arguments)

    def make_loss(self) -> Loss:
        return Loss(self.make_schedule(), **self.loss)

    def make_model(self) -> UNet | EmbeddingMLP:
        """With new weights, by torch's default generator. Raises ValueError where neither unet nor mlp is."""
        if self.unet is not None:
            return UNet(self.unet)
        if self.mlp is not None:
            return EmbeddingMLP(len(self.make_schedule()), self.mlp)
        raise ValueError("the config has neither [unet] nor [mlp]: give a model")

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `Sampler` for the model: of the loss, and `sampling`."""
        settings = {"prediction": self.loss.get("prediction", "epsilon"), **self.sampling}
        if settings.get("clip") == math.inf:
            settings["clip"] = None
        return settings | ({"variance": self.loss["variance"]} if "variance" in self.loss else {})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes back; what is None is left out."""
        values = {name: _plain(value) for name, value in asdict(self).items() if value is not None}
        for name in ("unet", "mlp", "optimizer"):
            if name in values:
                values[name] = {k: _plain(v) for k, v in values[name].items() if v is not None}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Raises ValueError that names a key that is not known, and those that are."""
        _known("", values, {f.name for f in fields(cls)})
        made = dict(values)
        for name, kind in (("unet", UNetConfig), ("mlp", MLPConfig), ("optimizer", OptimizerConfig)):
            if name in made:
                _known(name, made[name], {f.name for f in fields(kind)})
                try:
                    made[name] = kind(**made[name])
                except TypeError as error:  # an argument without a default is missing
                    raise ValueError(f"[{name}]: {error}") from error
        return cls(**made)

    @classmethod
    def read(cls, source: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
        """From a TOML file, or the name of a preset; ``changes`` are laid over it, section by section.

        Raises:
            FileNotFoundError, ValueError: no such file; not TOML; see the class.
        """
        if isinstance(source, str):
            _choice("preset", source, PRESETS)
            source = _PRESETS / f"{source}.toml"
        if not source.is_file():
            raise FileNotFoundError(f"{source} is not a file")
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except ValueError as error:  # neither TOML nor UTF-8
            raise ValueError(f"{source} is not TOML: {error}") from error
        try:
            return cls.from_dict(_merged(values, changes or {}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source.name}: {error}") from error

    def to_toml(self) -> str:
        values = self.to_dict()
        sections = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines = [f"{name} = {_toml(v)}" for name, v in values.items() if name not in sections]
        for section, members in sections.items():
            lines += ["", f"[{section}]", *(f"{name} = {_toml(v)}" for name, v in members.items())]
        return "\n".join(lines) + "\n"

    def check_same_run(self, other: Mapping[str, Any]) -> None:
        """ValueError naming what differs from the config of the run that is resumed, but for `FREE`."""
        mine, other = self.to_dict(), Config.from_dict(other).to_dict()
        differing = []
        for name in sorted(mine.keys() | other.keys()):
            a, b = mine.get(name), other.get(name)
            if name in FREE or a == b:
                continue
            if isinstance(a, dict) and isinstance(b, dict):
                differing += [
                    f"{name}.{key} was {b.get(key)!r}, is {a.get(key)!r}"
                    for key in sorted(a.keys() | b.keys())
                    if a.get(key) != b.get(key)
                ]
            else:
                differing.append(f"{name} was {b!r}, is {a!r}")
        if differing:
            told = "; ".join(differing)
            raise ValueError(f"this is not the run that is resumed: {told}. May change: {', '.join(FREE)}")


def parse_changes(assignments: list[str]) -> dict[str, Any]:
    """``["optimizer.lr=1e-4"]`` as what `Config.read` lays over a file; ValueError for what is not TOML."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        try:
            changes = _merged(changes, tomllib.loads(assignment))
        except ValueError as error:
            raise ValueError(f"--set {assignment!r} is not KEY=VALUE in TOML: {error}") from error
    return changes


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _known(section: str, values: Any, allowed: set[str]) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"[{section}] must be a table of keys, got {values!r}")
    if unknown := sorted(values.keys() - allowed):
        where = f" in [{section}]" if section else ""
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"unknown key {names}{where}; allowed: {', '.join(sorted(allowed))}")


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _number(config: Any, name: str, allowed: Any, words: str, prefix: str = "") -> None:
    object.__setattr__(config, name, check_number(prefix + name, getattr(config, name), allowed, words))


def _tuple_of_rates(config: Any, name: str, prefix: str = "") -> None:
    values = getattr(config, name)
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{prefix}{name} must be a list of numbers, got {values!r}")
    rates = tuple(check_number(prefix + name, v, lambda v: 0 <= v < 1, "in [0, 1)") for v in values)
    object.__setattr__(config, name, rates)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
