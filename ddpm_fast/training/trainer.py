"""The loop: batches in, updates, averages, checkpoints and pictures out."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import pictures
from ..losses import SecondMomentSampler
from ..ops import _dispatch
from ..sampler import Sampler, to_uint8
from ..threads import worthwhile
from ..unet import UNet
from . import data, points, state
from .batches import Batches, Part
from .config import Config
from .draws import LAYERS, Draws, stream_seed
from .ema import Ema
from .log import Log
from .processes import Processes
from .step import TrainStep

__all__ = ["Trainer"]

SAMPLES_AT_A_TIME = 256


class Trainer:
    """Trains a model as a `Config` says, in a folder that another such call can go on from::

        Trainer(Config.read("digits"), "digits").fit()

    The folder holds config.toml, log.jsonl (see `Log`), samples/ and checkpoints/ (see `state`). What an
    update draws depends on (seed, update) only: a run that is killed and resumed is, on a CPU and with as
    many threads and processes, the uninterrupted one to the bit. Split over other processes it is the same
    but for rounding, and for what the model draws itself (dropout).

    Args:
        config: see `Config`.
        out: the run's folder, to be created.
        device: to train on.
        processes: see `joined`; the batch is split over them.
        model: to train, where the config has none; with the weights to begin with, the same in each process.
        images: (N, ...) floating in [-1, 1], or uint8 (N, C, H, W), in place of the config's ``data``.
        labels: (N,) int64, their classes, for a network that has some.
        resume: "auto": go on from the last checkpoint in ``out``, if there is one; or the folder of one.
            None: begin, in a folder without any.
        strict: an image that cannot be read is an error, rather than left out.
        bar: show a progress bar.

    Attributes:
        update: how many are done.
        schedule: of the config.

    Raises:
        TypeError, ValueError: arguments that do not fit; see `Config` and `data.load`. A checkpoint of
            another run or model.
        FileExistsError: ``out`` holds a run, and ``resume`` is None.
        OSError: ``out`` cannot be written, or has no room for the checkpoints.
    """

    def __init__(
        self,
        config: Config,
        out: str | PathLike[str],
        *,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
        model: nn.Module | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        resume: str | PathLike[str] | None = None,
        strict: bool = False,
        bar: bool = True,
    ) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, got {type(config).__name__}")
        self.config, self.out = config, Path(out)
        self.device, self.processes = torch.device(device), processes or Processes()
        self.schedule, self._bar = config.make_schedule(), bar
        parts = config.accumulate * self.processes.count
        if config.batch % parts:
            raise ValueError(
                f"batch must be a multiple of accumulate x processes = {parts}, got {config.batch}"
            )
        checkpoints = self._prepare_folder(resume)
        found = self._find(checkpoints, resume)
        if model is not None and (config.unet or config.mlp):
            raise ValueError("model: the config has one, [unet] or [mlp]; give one of the two")

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, LAYERS, 2**64 - 1))
            model = config.make_model() if model is None else model
        layout = {"memory_format": torch.channels_last} if isinstance(model, UNet) else {}
        model = model.to(self.device, **layout).train()
        embeds = model.config.num_class_embeds if isinstance(model, UNet) else None
        self._classes = embeds and embeds - (config.label_dropout > 0)
        self.images = self._load(images, labels, strict)
        self._check_fit(model)

        kind = torch.optim.AdamW if config.optimizer.name == "adamw" else torch.optim.Adam
        optimizer = kind(
            model.parameters(),
            config.optimizer.lr,
            config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        averages = tuple(Ema(model, rate) for rate in config.ema)
        times = None
        if config.times == "second_moment":
            times = SecondMomentSampler(len(self.schedule), device=self.device)
        self._members = state.Members(model, optimizer, averages, times)
        self._check_room()
        self.update = 0
        if found is not None:
            self._resume(found)
        call = model
        if self.processes.count > 1:
            call = DistributedDataParallel(model, broadcast_buffers=False)
        self._step = TrainStep(
            call,
            config.make_loss().to(self.device),
            optimizer,
            clip=config.optimizer.clip,
            compile=self._compiles(),
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
            observe=None if times is None else lambda t, losses: self._losses.append(losses),
        )
        self._draws = Draws(
            config.seed,
            len(self.images),
            config.batch,
            len(self.schedule),
            config.times,
            config.flip,
            config.label_dropout,
        )
        self._batches = Batches(
            self.images,
            self._draws,
            self.processes,
            config.accumulate,
            None if self._classes is None else embeds - 1,
            self.device,
            layout.get("memory_format", torch.contiguous_format),
        )
        self._sampler = Sampler(self.model, self.schedule, **config.settings())
        if self.processes.first:
            (self.out / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        self._unread: list[Tensor] = []  # loss and norm of the updates since the log's last line
        self._last: Tensor | None = None  # the last of them, read or not
        self._losses: list[Tensor] = []  # of the samples of this update's parts

    @property
    def last_checkpoint(self) -> Path | None:
        """The folder of the one that was written last."""
        folder = self.out / "checkpoints"
        return folder / f"{found[-1]:08}" if (found := state.numbers(folder)) else None

    @property
    def model(self) -> nn.Module:
        """What is sampled from: the first average of the weights, or the weights themselves."""
        return self._members.result

    @property
    def loss(self) -> Tensor:
        """The mean loss of the update before, 0-d, on the device; of this process's images.

        Raises:
            RuntimeError: before the first update.
        """
        if self._last is None:
            raise RuntimeError("there is no loss yet: no update has been made")
        return self._last[0]

    def fit(self) -> nn.Module:
        """Train to the config's last update; returns `model`.

        Raises:
            RuntimeError: a loss or a gradient that is not finite; the last checkpoint is from before.
            OSError: a checkpoint, a picture or the log cannot be written; those before it stay.
        """
        config, begun = self.config, self.update
        log = Log(self.out if self.processes.first else None, config.updates, begun, self._bar)
        logged = begun
        cuda = [self.device] if self.device.type == "cuda" else []
        with ExitStack() as on:
            on.callback(log.close)
            on.enter_context(torch.random.fork_rng(devices=cuda))
            sample = torch.empty(1, *self.images.shape, device=self.device)
            part = sample.expand(self._batches.size, *self.images.shape)
            on.enter_context(worthwhile(self._members.model, part))
            for done in self.updates():
                last = done == config.updates
                saves = last or done % config.checkpoint_every == 0
                draws = last or (config.sample_every and done % config.sample_every == 0)
                if saves or draws or done % config.log_every == 0:
                    found = self._read()
                    log.write(done, (done - logged) * config.batch, found)
                    logged = done
                if saves or draws:
                    start = time.perf_counter()
                    if self.processes.first:
                        if saves:
                            self.save()
                        if draws:
                            self.draw()
                    self.processes.wait()
                    log.paused(time.perf_counter() - start)
        return self.model

    def updates(self) -> Iterator[int]:
        """One update at each turn, to the config's last, and nothing else: yields how many are done.

        It seeds torch's default generators, which what the model draws itself depends on.
        """
        self._losses.clear()  # of an update that was interrupted, as its gradients
        self._members.optimizer.zero_grad()
        for update, parts in self._batches(range(self.update, self.config.updates)):
            self._set_rate(update)
            self._draw_layers(update)
            self._last = torch.stack(self._descend(update, parts))
            self._unread.append(self._last)
            for average in self._members.averages:
                average.update(update)
            self.update = update + 1
            yield self.update

    def save(self) -> Path:
        """Write a checkpoint of now; returns its folder."""
        return state.save(
            self.out / "checkpoints",
            self._members,
            update=self.update,
            keep=self.config.keep,
            config=self.config,
            schedule=self.schedule,
            info={"images": self._seen()},
        )

    def draw(self) -> Path | None:
        """Write a picture of samples as they are now; returns its file. None for what is no picture.

        Of a network with classes they are of each in turn, a column a class.
        """
        shape = self.images.shape
        is_image = len(shape) == 3 and shape[0] in (1, 3, 4)
        if not is_image and shape != (2,):
            return None
        count = self.config.samples
        at_a_time = SAMPLES_AT_A_TIME if is_image else count
        classes, columns, drawn = self._classes, None, []
        if classes is not None and classes <= count:
            columns = classes  # one each
        for k in range(0, count, at_a_time):
            size = min(at_a_time, count - k)
            of_class = {}
            if classes is not None:
                of_class["class_labels"] = torch.arange(k, k + size, device=self.device) % classes
            drawn.append(self._sampler(size, shape=shape, seed=0, first_image=k, **of_class).cpu())
        x = torch.cat(drawn)
        path = self.out / "samples" / f"{self.update:08}.png"
        pixels = to_uint8(x) if is_image else points.picture(x)[None]
        pictures.write(pixels, path, "png-grid", columns=columns)
        return path

    # Before the first update

    def _prepare_folder(self, resume: str | PathLike[str] | None) -> Path:
        checkpoints = self.out / "checkpoints"
        if resume is None and state.numbers(checkpoints):
            raise FileExistsError(f"{self.out} holds a run: resume it ('auto'), or give another folder")
        if self.processes.first:
            for folder in (checkpoints, self.out / "samples"):
                pictures.check_writable(folder, "png-dir")
        return checkpoints

    def _find(self, checkpoints: Path, resume: str | PathLike[str] | None) -> state.State | None:
        if resume is None:
            return None
        if resume != "auto":
            return state.read(Path(resume))
        found = state.newest(checkpoints, self._tell) if self.processes.first else None
        self.processes.wait()  # the first one clears away what was left half written
        return found if self.processes.first else state.newest(checkpoints, lambda text: None)

    def _load(self, images: Tensor | None, labels: Tensor | None, strict: bool) -> data.Images:
        labelled = self._classes is not None
        if labels is not None and (images is None or not labelled):
            what = "go with images" if images is None else "are for a U-Net with num_class_embeds"
            raise ValueError(f"labels {what}, of which there is none")
        if images is not None:
            if labelled and labels is None:
                raise ValueError("labels must be given with images, for a U-Net with num_class_embeds")
            return data.InMemory(images, self.device, labels)
        unet = self.config.unet
        size = unet.sample_size if unet is not None else None
        return data.load(
            self.config.data,
            channels=3 if unet is None else unet.in_channels,
            size=(size, size) if isinstance(size, int) else size,
            crop=self.config.crop,
            strict=strict,
            labelled=labelled,
            device=self.device,
            tell=self._tell,
        )

    def _check_fit(self, model: nn.Module) -> None:
        shape = tuple(self.images.shape)
        try:
            wanted = getattr(model, "sample_shape", None)
        except ValueError:  # a U-Net of any size
            wanted = (model.config.in_channels, *shape[1:])
        if wanted is not None and tuple(wanted) != shape:
            raise ValueError(f"data: what is learned has shape {shape}, the network's is {tuple(wanted)}")
        if self.config.label_dropout and self._classes is None:
            raise ValueError("label_dropout is for a U-Net with num_class_embeds, which the model is not")
        if self._classes is not None and int(self.images.labels.max()) >= self._classes:
            beside = ", beside the one that stands for none" if self.config.label_dropout else ""
            raise ValueError(
                f"data: its labels go up to {int(self.images.labels.max())}, the network has {self._classes} "
                f"classes from 0 on{beside}"
            )
        if self.config.flip and len(shape) < 2:
            raise ValueError("flip is for images: points have no left and right")

    def _check_room(self) -> None:
        if not self.processes.first:
            return
        needed = self._members.nbytes() * (self.config.keep + 1)  # the next is written before one goes
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise OSError(
                f"{self.out} has {free / 1e6:.0f} MB free, {self.config.keep + 1} checkpoints need "
                f"{needed / 1e6:.0f} MB"
            )

    def _resume(self, found: state.State) -> None:
        self.config.check_same_run(found.info["config"])
        seen = self._seen()
        if found.info["images"] != seen:
            raise ValueError(f"data: the run had {found.info['images']}, now it is {seen}: not the same run")
        found.restore(self._members)
        self.update = found.update

    def _seen(self) -> dict[str, Any]:
        """What a checkpoint says of the images."""
        seen = {"count": len(self.images), "shape": list(self.images.shape)}
        return seen | ({} if self.images.classes is None else {"classes": list(self.images.classes)})

    def _compiles(self) -> bool:
        """Whether an update is one compiled graph."""
        alone = self.processes.count == 1 and self.config.accumulate == 1
        if self.config.compile != "auto":
            if self.config.compile and not alone:
                raise ValueError("compile=true is for one process, and a batch in one part")
            return bool(self.config.compile)
        small = isinstance(self._members.model, points.EmbeddingMLP) and self.device.type == "cpu"
        learns = self.config.times == "second_moment"
        return small and alone and not learns and _dispatch.NATIVE_MISSING is None

    def _tell(self, text: str) -> None:
        if self.processes.first:
            tqdm.write(text, file=sys.stderr)

    # One update

    def _descend(self, update: int, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """The mean loss, and the norm of the gradients."""
        t, weight = self._draws.times_of(update, self._members.times)
        given = []
        for part in parts:
            more = {"class_labels": part.labels, "weight": None if weight is None else weight[part.rows]}
            given.append(
                {
                    "x0": part.x0,
                    "t": t[part.rows].to(self.device, non_blocking=True),
                    "seed": self.config.seed,
                    "image_index": part.first,
                    **{name: value for name, value in more.items() if value is not None},
                }
            )
        if len(given) == 1:
            found = self._step(**given[0])
        else:
            losses = []
            for k, arguments in enumerate(given):
                with ExitStack() as on:
                    if self.processes.count > 1 and k < len(given) - 1:
                        on.enter_context(self._step.model.no_sync())  # the last one's exchange is of all
                    losses.append(self._step.backward(share=1 / len(given), **arguments))
            found = torch.stack(losses).sum(), self._step.finish()
        if self._members.times is not None:
            losses = self.processes.gathered(torch.stack(self._losses))  # (processes, parts, b)
            self._losses.clear()
            self._members.times.update(t, losses.transpose(0, 1).flatten())
        return found

    def _set_rate(self, update: int) -> None:
        rate = self.config.optimizer.rate(update, self.config.updates)
        for group in self._members.optimizer.param_groups:
            group["lr"] = rate

    def _draw_layers(self, update: int) -> None:
        """Seed what the model draws from: a number for each update and process."""
        count, rank = self.processes.count, self.processes.rank
        seed = stream_seed(self.config.seed, LAYERS, update * count + rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _read(self) -> dict[str, float]:
        """What the log says of the updates since its last line. RuntimeError for one that is not finite."""
        found = self.processes.mean(torch.stack(self._unread)).tolist()
        self._unread.clear()
        first = self.update - len(found)
        for k, (loss, norm) in enumerate(found, 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = self.last_checkpoint
                kept = "no checkpoint was saved" if kept is None else f"the last checkpoint is {kept}"
                what = f"the loss is {loss}, the norm of its gradient {norm}"
                raise RuntimeError(f"update {first + k}: {what}; stopped, {kept}")
        return {
            "loss": sum(loss for loss, _ in found) / len(found),
            "norm": found[-1][1],
            "lr": self.config.optimizer.rate(self.update - 1, self.config.updates),
        }
