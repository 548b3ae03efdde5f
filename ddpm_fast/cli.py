"""``ddpm-fast sample | train | bpd | ...``: models and pictures, without a line of Python."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from . import checkpoint, pictures
from .info import info as gather_info
from .sampler import METHODS, Sampler, to_uint8

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
SUFFIXES = {".png": "png-grid", ".npz": "npz", "": "png-dir"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_OUT = {"png-grid": "samples.png", "png-dir": "samples", "npz": "samples.npz"}


@app.callback()
def ddpm_fast() -> None:
    """Fast, exact sampling of denoising diffusion models."""


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


Folder = Annotated[
    Path, _option("Folder of ddpm_fast's or diffusers'; default: the bundled digits.", "--checkpoint")
]
Device = Annotated[str | None, _option("Default: cuda if there is one, else cpu.")]
Data = Annotated[str | None, _option("A folder of images, or an .npz; default: the held-out digits.")]
First = Annotated[int, _option("The first images of the data; default: 64.")]
Seed = Annotated[int, _option("64 bits, of the noise; default: 0.")]
Pairs = Annotated[int, _option("Images at a time, at any t; default: 128.")]
Json = Annotated[Path | None, _option("A file for all numbers; -: stdout, in place of lines.", "--json")]


@app.command()
def sample(
    folder: Folder = checkpoint.DIGITS,
    method: Annotated[str | None, _option(f"{' | '.join(METHODS)}; default: the checkpoint's.")] = None,
    steps: Annotated[int | None, _option("Model calls; default: 50 of ddim, 20 of dpm_solver, T.")] = None,
    n: Annotated[int, _option("Number of images; default: 64.")] = 64,
    seed: Annotated[int, _option("64 bits; image k of a seed is always the same; default: 0.")] = 0,
    first_image: Annotated[int, _option("Index of the first image; default: 0.")] = 0,
    batch: Annotated[int, _option("Images at a time; default: 64.")] = 64,
    class_labels: Annotated[
        str | None, _option("Of a model with classes, in turn: 3, or 0,1,2. Image k has always the same.")
    ] = None,
    device: Device = None,
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
    labels = None if class_labels is None else _labels(class_labels)
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
        size, index = min(batch, n - first), first_image + first
        chosen = None if labels is None else labels[torch.arange(index, index + size) % len(labels)]
        x = sampler(size, seed=seed, first_image=index, class_labels=chosen, progress=True)
        images.append(to_uint8(x).cpu())
    seconds = time.perf_counter() - start
    pictures.write(torch.cat(images), out, form, first_image)
    kind = f"{sampler.table.method}, {len(sampler.table)} steps, {device}"
    typer.echo(f"{out}: {n} images in {seconds:.2f} s, {n / seconds:.1f} images/s ({kind})")


@app.command()
def bpd(
    folder: Folder = checkpoint.DIGITS,
    data: Data = None,
    n: First = 64,
    seed: Seed = 0,
    batch_size: Pairs = 128,
    device: Device = None,
    json_to: Json = None,
    out: Annotated[
        Path | None, _option("Each term over t; default: bpd.png where there is matplotlib.")
    ] = None,
) -> None:
    """Bits a dimension that the model needs for images: an upper bound, term by term."""
    from . import experiments  # loads training and plots

    experiments.bpd(experiments.Asked(folder, data, n, seed, batch_size, _device(device), json_to), out)


@app.command()
def progressive(
    folder: Folder = checkpoint.DIGITS,
    data: Data = None,
    n: First = 64,
    seed: Seed = 0,
    batch_size: Pairs = 128,
    device: Device = None,
    json_to: Json = None,
    out: Annotated[Path, _option("What is seen of the first 8; default: progressive.png.")] = Path(
        "progressive.png"
    ),
    plot_to: Annotated[
        Path | None, _option("The curve; default: rate-distortion.png where there is matplotlib.", "--plot")
    ] = None,
) -> None:
    """Send images from coarse to fine: the bits so far, and how far off is what the receiver sees."""
    from . import experiments

    asked = experiments.Asked(folder, data, n, seed, batch_size, _device(device), json_to)
    experiments.progressive(asked, out, plot_to)


@app.command()
def interpolate(
    folder: Folder = checkpoint.DIGITS,
    data: Data = None,
    n: Annotated[int, _option("Pairs: images k and n + k of the data; default: 8.")] = 8,
    t: Annotated[int | None, _option("When they are mixed; default: T // 2.", "--t")] = None,
    mixes: Annotated[int, _option("Of a pair, from one end to the other; default: 11.")] = 11,
    method: Annotated[str, _option(f"{' | '.join(METHODS)}; default: ddpm.")] = "ddpm",
    steps: Annotated[int | None, _option("Model calls; default: t + 1.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, _option("Pairs at a time; default: 8.")] = 8,
    device: Device = None,
    out: Annotated[Path, _option("A row a pair; default: interpolate.png.")] = Path("interpolate.png"),
) -> None:
    """Noise two images, mix them, and sample on: one turns into the other."""
    from . import experiments

    asked = experiments.Asked(folder, data, n, seed, batch_size, _device(device))
    experiments.interpolate(asked, t, mixes, method, steps, out)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="CONFIG.toml; or give --preset.", show_default=False)
    ] = None,
    preset: Annotated[str | None, _option("digits | cifar10 | s-curve.")] = None,
    data: Annotated[str | None, _option("A folder of images, or an .npz; default: the config's.")] = None,
    out: Annotated[Path | None, _option("The run's folder; default: runs/NAME.")] = None,
    updates: Annotated[int | None, _option("In all; default: the config's.")] = None,
    seed: Annotated[int | None, _option("Default: the config's.")] = None,
    changes: Annotated[
        list[str] | None, _option("KEY=VALUE over the config's, as optimizer.lr=1e-4; many.", "--set")
    ] = None,
    resume: Annotated[str | None, _option("auto: go on where --out ended; or a checkpoint's folder.")] = None,
    strict: Annotated[bool, _option("An image that cannot be read is an error.", "--strict")] = False,
    device: Device = None,
    export: Annotated[str | None, _option("diffusers: in the end also a pipeline, in OUT/diffusers.")] = None,
) -> None:
    """Train a model; under torchrun in several processes."""
    from . import training  # loads what no other command needs

    if (config is None) == (preset is None):
        raise ValueError("give CONFIG.toml or --preset, one of the two")
    if export not in (None, "diffusers"):
        raise ValueError(f"--export {export!r} is not known; allowed: diffusers")
    given = {"data": data, "updates": updates, "seed": seed}
    over = training.parse_changes(changes or []) | {k: v for k, v in given.items() if v is not None}
    chosen = training.Config.read(preset or config, over)
    if export is not None and chosen.unet is None:
        raise ValueError("--export is for U-Nets: the config has no [unet]")
    out = out or Path("runs") / (preset or config.stem)
    with training.joined(_device(device)) as (processes, device):
        trainer = training.Trainer(
            chosen, out, device=device, processes=processes, resume=resume, strict=strict
        )
        begun, start = trainer.update, time.perf_counter()
        model = trainer.fit()
        if not processes.first:
            return
        if export is not None:
            checkpoint.save_diffusers(out / "diffusers", model, trainer.schedule, chosen.settings())
        done, seconds = trainer.update - begun, time.perf_counter() - start
        typer.echo(f"{trainer.last_checkpoint}: {done} updates in {seconds:.1f} s ({device})")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of diffusers' or ddpm_fast's.", show_default=False)],
    method: Annotated[str | None, _option("ddpm | ddim; default: the folder's.")] = None,
    steps: Annotated[int | None, _option("Model calls; default: at most 50.")] = None,
    batch_size: Annotated[int, _option("Images; default: 1.")] = 1,
    seed: Annotated[int, _option("Of the noise of both; default: 0.")] = 0,
    dtype: Annotated[str | None, _option(f"Of ours: {' | '.join(DTYPES)}; default: as stored.")] = None,
    device: Device = None,
    out: Annotated[Path, _option("The picture; default: verify.png.")] = Path("verify.png"),
) -> None:
    """Run diffusers and ddpm_fast side by side; exit status 1 if the images differ past tolerance."""
    from .compat.diffusers.verify import verify as run_both  # diffusers is an optional extra

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not known; allowed: {', '.join(DTYPES)}")
    pictures.check_png("--out", out)
    found = run_both(
        folder,
        method=method,
        num_steps=steps,
        batch_size=batch_size,
        seed=seed,
        dtype=DTYPES.get(dtype),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=True,
    )
    typer.echo(found)
    found.save_picture(out)
    typer.echo(f"{out}: the original, ours, and their difference amplified")
    if not found.ok:
        typer.echo("error: the images differ past tolerance", err=True)
        raise typer.Exit(1)


@app.command()
def bench(
    group: Annotated[
        str | None,
        typer.Argument(help="ops | steps | sampling | training; default: all.", show_default=False),
    ] = None,
    only: Annotated[str | None, _option("One part of it, such as waterfall.")] = None,
    device: Device = None,
    json_to: Annotated[Path | None, _option("Everything that was found.", "--json")] = None,
    plot_to: Annotated[Path | None, _option("The pictures: .png, .svg or .pdf.", "--plot")] = None,
    threads: Annotated[int | None, _option("Of every arm; default: torch's.")] = None,
    rounds: Annotated[int | None, _option("Of every measurement; default: 5 to 30.")] = None,
    quick: Annotated[bool, _option("Small and few: to see that all of it runs.", "--quick")] = False,
    network: Annotated[str, _option("ddpm-cifar10-32 | ddpm-celebahq-256.")] = "ddpm-cifar10-32",
    skip: Annotated[
        list[str] | None, _option("Leave out arms with this in their name, such as max-autotune; repeatable.")
    ] = None,
) -> None:
    """Time the ops, a step, sampling and training beside the peers that are installed."""
    from .bench import networks, suite  # loads much that no other command needs

    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if rounds is not None and rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {rounds}")
    if network not in networks.NETWORKS:
        raise ValueError(f"--network {network!r} is not known; allowed: {', '.join(networks.NETWORKS)}")
    parts = suite.choose(group, only)
    settings = suite.Settings(
        device=_device(device), rounds=rounds, quick=quick, network=network, skip=tuple(skip or ()), bar=True
    )
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["ddpm-fast", *sys.argv[1:]])
    suite.run(parts, settings, command=command, json_to=json_to, plot_to=plot_to, show=typer.echo)


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
    return checkpoint.of_model(settings) | {"method": method}


def _labels(text: str) -> Tensor:
    try:
        return torch.tensor([int(label) for label in text.split(",")])
    except ValueError:
        raise ValueError(f"--class-labels must be integers such as 3 or 0,1,2, got {text!r}") from None


def _device(name: str | None) -> torch.device:
    """The one that is named, else a GPU where there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not measured; allowed: cpu, cuda")
    return device


def main() -> None:
    """Entry point: a mistake of the user's is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
