"""The trainer: killed and resumed, split over processes, and refused before it starts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ddpm_fast import Sampler, UNet, UNetConfig, checkpoint, cli
from ddpm_fast.losses import Loss, SecondMomentSampler, antithetic
from ddpm_fast.training import Config, OptimizerConfig, Trainer, load, state
from ddpm_fast.training.draws import Draws
from ddpm_fast.training.ema import Ema
from ddpm_fast.training.points import MLPConfig
from ddpm_fast.training.processes import Processes, joined

UNET = UNetConfig((8,), (True,), (False,), sample_size=8, norm_num_groups=4, layers_per_block=1)
TINY = Config(
    updates=20,
    batch=4,
    seed=3,
    ema=(0.9, 0.5),
    checkpoint_every=5,
    sample_every=0,
    samples=2,
    log_every=1,
    unet=UNET,
    schedule={"kind": "cosine", "T": 20},
    loss={"prediction": "v"},
    optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup=3, decay="cosine", clip=1.0),
    sampling={"method": "ddim", "num_steps": 2},
)
EVERYTHING = dataclasses.replace(
    TINY,
    updates=24,
    accumulate=2,
    times="antithetic",
    flip=True,
    checkpoint_every=1,
    keep=2,
    unet=dataclasses.replace(UNET, dropout=0.2),
)
POINTS = dataclasses.replace(
    TINY, unet=None, mlp=MLPConfig(8), ema=(), loss={}, compile=False, sampling={"method": "ddpm"}
)


def images(count: int = 7) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trainer(config, out, **options) -> Trainer:
    given = torch.randn(50, 2) if config.mlp else images()
    return Trainer(config, out, **{"images": given, "bar": False} | options)


def change(config: Config, **changes) -> Config:
    return dataclasses.replace(config, **changes)


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def final(out) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    folder = out / "checkpoints" / f"{state.numbers(out / 'checkpoints')[-1]:08}"
    return {
        f"{name}.{key}": value
        for name in ("model", "training")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# In processes of their own, forked from one that has imported what they need.


def run(config, out, rank: int = 0, count: int = 1, port: int = 0) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(torch.device("cpu")) as (processes, device):
        trainer(config, out, device=device, processes=processes, resume="auto").fit()


@pytest.fixture(scope="module")
def process():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "test_training_trainer"])  # of which optimizers ask
    with pytest.MonkeyPatch.context() as patch:  # so that the server finds that module
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context.Process


def finish(made) -> None:
    made.join(120)
    assert made.exitcode == 0


def test_killed_and_resumed_it_is_the_uninterrupted_run(tmp_path, process):
    """SIGKILL wherever it hits, most often in a checkpoint's writing, since there is one an update."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = process(target=run, args=(EVERYTHING, whole))
    first.start()
    finish(first)
    rng, kills = random.Random(0), 0
    for update in sorted(rng.sample(range(2, EVERYTHING.updates - 6), 5)):
        made = process(target=run, args=(EVERYTHING, killed))
        made.start()
        end = time.monotonic() + 60
        while made.is_alive() and time.monotonic() < end:
            if (killed / "log.jsonl").is_file() and len(log_lines(killed)) >= update:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        made.kill()
        made.join(60)
        kills += made.exitcode == -9
    assert kills >= 4  # one may have come to its end first
    last = process(target=run, args=(EVERYTHING, killed))
    last.start()
    finish(last)
    assert_equal(final(killed), final(whole))
    assert {"training.ema.1.conv_in.weight", "training.optimizer.conv_in.weight.exp_avg"} <= final(
        whole
    ).keys()
    assert len(state.numbers(killed / "checkpoints")) == EVERYTHING.keep
    assert not [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]
    for a, b in zip(log(killed), log(whole), strict=True):
        assert [a[k] for k in ("update", "loss", "norm", "lr")] == [
            b[k] for k in ("update", "loss", "norm", "lr")
        ]


def log_lines(out) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines()


@pytest.mark.parametrize(("accumulate", "times"), [(1, "antithetic"), (2, "second_moment")])
def test_two_processes_are_one(tmp_path, process, accumulate, times):
    """The same global batch: the same times, noise and flips, so the same loss but for rounding."""
    config = change(TINY, updates=50, batch=8, accumulate=accumulate, flip=True, times=times)
    config = change(
        config, schedule={"kind": "cosine", "T": 4}
    )  # so that times are soon drawn by their losses
    config = change(config, checkpoint_every=50, optimizer=OptimizerConfig(lr=1e-3, warmup=10, clip=1.0))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    split = [process(target=run, args=(config, tmp_path / "two", rank, 2, port)) for rank in range(2)]
    for made in split:
        made.start()
    trainer(change(config, accumulate=1), tmp_path / "one").fit()
    for made in split:
        finish(made)
    one, two = ([line["loss"] for line in log(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 50 and one[0] != one[1]
    np.testing.assert_allclose(two, one, rtol=1e-5)
    if times == "second_moment":
        a, b = (final(tmp_path / name) for name in ("one", "two"))
        assert torch.equal(a["training.times.counts"], b["training.times.counts"])
        assert int(a["training.times.counts"].min()) > 10  # its history is full
        squares = (found["training.times.squares"] for found in (a, b))
        torch.testing.assert_close(*squares, rtol=1e-4, atol=0)


def test_times_by_the_second_moment_are_the_plain_loop(tmp_path, one_thread):
    """Written out: drawn by the losses of the updates before, which are weighted; recorded unweighted."""
    config = change(POINTS, updates=40, batch=16, times="second_moment", schedule={"kind": "cosine", "T": 4})
    given = torch.randn(50, 2)
    made = trainer(config, tmp_path, images=given)
    model, loss = copy.deepcopy(made._members.model), Loss(made.schedule)
    made.fit()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    draws, sampler = Draws(config.seed, 50, 16, 4, "second_moment", False), SecondMomentSampler(4)
    losses = []
    for update in range(config.updates):
        t, weight = draws.times_of(update, sampler)
        each = loss(model, given[draws(update).indices], t, seed=config.seed, image_index=16 * update)
        (weight * each).mean().backward()
        sampler.update(t, each.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.optimizer.rate(update, config.updates)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((weight * each).mean().item())
    assert losses == [line["loss"] for line in log(tmp_path)]
    assert not torch.equal(weight, torch.ones(16)) and int(sampler.counts.sum()) == 16 * 40


def test_an_interrupted_update_leaves_nothing(tmp_path, monkeypatch, one_thread):
    config = change(TINY, updates=3, accumulate=2, times="second_moment", log_every=3)
    whole, broken = (trainer(config, tmp_path / name) for name in ("a", "b"))
    with pytest.raises(RuntimeError, match="there is no loss yet"):
        _ = broken.loss
    broken._members.model.load_state_dict(whole._members.model.state_dict())
    step, backward = broken._step, broken._step.backward
    calls = []

    def interrupted(*args, **given):
        calls.append(backward(*args, **given))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(step, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(broken.updates())
    monkeypatch.setattr(step, "backward", backward)
    assert broken.update == 1 and list(broken.updates()) == [2, 3] and list(whole.updates()) == [1, 2, 3]
    for a, b in zip(whole._members.model.parameters(), broken._members.model.parameters(), strict=True):
        assert torch.equal(a, b)
    whole._read()  # as the log does
    assert torch.equal(whole.loss, broken.loss)


CLASSES = dataclasses.replace(
    EVERYTHING,
    updates=20,
    times="second_moment",
    label_dropout=0.5,
    schedule={"kind": "cosine", "T": 4},
    checkpoint_every=15,
    unet=dataclasses.replace(EVERYTHING.unet, num_class_embeds=4),
)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def test_classes_and_learned_times_resume_to_the_bit(tmp_path, one_thread):
    """After 15 of 20 updates; the times are drawn by their losses by then."""
    runs = []
    for updates, out in ((20, "a"), (15, "b"), (20, "b")):
        config = change(CLASSES, updates=updates, optimizer=OptimizerConfig(lr=1e-2))
        made = trainer(config, tmp_path / out, labels=LABELS, resume="auto")
        made.fit()
        runs.append(made)
    assert runs[2]._members.times.probabilities().unique().numel() > 1
    assert_equal(final(tmp_path / "a"), final(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"label_dropout was 0.5, is 0.0.*times was 'second_moment'"):
        plain = change(CLASSES, label_dropout=0.0, times="uniform", optimizer=OptimizerConfig(lr=1e-2))
        trainer(plain, tmp_path / "a", labels=LABELS, resume="auto")


def test_a_network_with_classes(tmp_path, one_thread):
    """Each image comes with its label, or with the class that stands for none; a picture has all but that."""
    config = change(CLASSES, batch=8, accumulate=1, updates=50, samples=6, times="uniform", flip=False)
    made = trainer(config, tmp_path, labels=LABELS)
    seen = []
    made._members.model.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    made.fit()
    dropped = 0
    for update, labels in enumerate(seen):
        batch = made._draws(update)
        expected = LABELS[batch.indices]
        expected[batch.unlabelled] = 3
        assert torch.equal(labels, expected)
        dropped += int(batch.unlabelled.sum())
    assert len(seen) == 50 and abs(dropped / 400 - 0.5) < 4 * 0.5 / 20
    model, schedule, settings = checkpoint.load(made.last_checkpoint)
    labels = torch.arange(6) % 3
    x = Sampler(model, schedule, **settings)(6, seed=0, class_labels=labels)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "00000050.png"))
    assert sheet.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # a column a class
    pixels = Sampler.to_uint8(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sheet[36:68:4, 2:34:4], pixels[3])


def test_a_folder_s_classes_are_the_run_s(tmp_path, one_thread):
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 99 * k, np.uint8)).save(tmp_path / "data" / name / "0.png")
    unet = change(UNET, num_class_embeds=2)
    config = change(TINY, data=str(tmp_path / "data"), updates=5, unet=unet)
    Trainer(config, tmp_path / "run", bar=False).fit()
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "elk")
    with pytest.raises(ValueError, match=r"'classes': \['cat', 'dog'\].*'classes': \['dog', 'elk'\]"):
        Trainer(config, tmp_path / "run", bar=False, resume="auto")


def test_it_is_the_plain_loop(tmp_path, one_thread):
    """Written out: the draws, the loss, torch's AdamW, the rate, the averages. Bit for bit."""
    config = change(TINY, updates=6, flip=True, times="antithetic", unet=change(UNET, dropout=0.0))
    made = trainer(config, tmp_path)
    model = UNet(UNET).to(memory_format=torch.channels_last)
    model.load_state_dict(made._members.model.state_dict())
    averages = [{n: p.clone().double() for n, p in model.named_parameters()} for _ in config.ema]
    made.fit()

    loss, data = Loss(made.schedule, prediction="v"), images()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    draws = Draws(config.seed, 7, 4, 20, "antithetic", True)
    losses = []
    for update in range(6):
        batch = draws(update)
        x0 = torch.stack(
            [data[k].flip(-1) if f else data[k] for k, f in zip(batch.indices, batch.flip, strict=True)]
        ).contiguous(memory_format=torch.channels_last)
        value = loss(model, x0, draws.times_of(update)[0], seed=config.seed, image_index=update * 4).mean()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = 1e-2 * min(1, (update + 1) / 3) * 0.5 * (1 + math.cos(math.pi * update / 6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        for average, decay in zip(averages, config.ema, strict=True):
            r = min(decay, (1 + update) / (10 + update))
            for name, p in model.named_parameters():
                average[name] = r * average[name] + (1 - r) * p.detach().double()
    assert losses == [line["loss"] for line in log(tmp_path)]
    for name, p in made._members.model.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])
    for average, kept in zip(averages, made._members.averages, strict=True):
        for name, p in kept.model.named_parameters():
            torch.testing.assert_close(p.double(), average[name], rtol=1e-6, atol=1e-7)
    assert made.model is made._members.averages[0].model


def test_an_average_s_buffers_are_the_model_s():
    model = nn.BatchNorm1d(2)
    average = Ema(model, 0.9)
    model.running_mean.fill_(3.0)
    average.update(0)
    assert torch.equal(average.model.running_mean, model.running_mean)
    assert not average.model.training and not average.model.weight.requires_grad


def test_draws_are_functions_of_the_update():
    draws = Draws(5, 10, 4, 100, "antithetic", True)
    dealt = torch.cat([draws(update).indices for update in range(5)])
    for epoch in (dealt[:10], dealt[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert dealt[:10].tolist() != dealt[10:].tolist()
    again = Draws(5, 10, 4, 100, "antithetic", True, 0.5)
    (t, weight), (before, _) = again.times_of(3), again.times_of(2)
    assert weight is None and torch.equal(t, draws.times_of(3)[0])
    assert torch.equal(again(3).flip, draws(3).flip) and draws(3).unlabelled is None
    dropped = torch.cat([again(update).unlabelled for update in range(100)]).float().mean()
    assert abs(dropped - 0.5) < 4 * 0.5 / 20
    assert torch.equal(t[:2] + t[2:], torch.full((2,), 99))
    assert not torch.equal(before, t)
    assert not torch.equal(Draws(6, 10, 4, 100, "antithetic", True).times_of(3)[0], t)
    small = Draws(0, 3, 8, 10, "uniform", False)(1)  # more than two epochs in one batch
    assert small.flip is None and small.first == 8
    assert sorted(small.indices[1:4].tolist()) == sorted(small.indices[4:7].tolist()) == [0, 1, 2]


def test_it_learns_in_either_precision(tmp_path, one_thread):
    """The loss of the average falls; under autocast it is about that of float32, and not the same."""
    learned = []
    for precision in ("float32", "bfloat16"):
        config = change(TINY, updates=60, checkpoint_every=60, precision=precision, batch=8)
        made = trainer(config, tmp_path / precision, images=images(2))
        loss, x0 = Loss(made.schedule, prediction="v"), images(2).repeat(50, 1, 1, 1)
        t = antithetic(100, 20, generator=torch.Generator().manual_seed(0))

        @torch.no_grad()
        def now(made=made, loss=loss, x0=x0, t=t):
            return float(loss(made.model, x0, t, seed=1, image_index=0).mean())

        before = now()
        made.fit()
        assert now() < 0.8 * before
        assert made.model.conv_in.weight.dtype == torch.float32
        learned.append([line["loss"] for line in log(tmp_path / precision)])
    exact, low = np.array(learned)
    assert (exact[1:] != low[1:]).all()  # at first a new network gives zeros, in either
    np.testing.assert_allclose(low[:20], exact[:20], rtol=0.02)


# What is written


def test_a_checkpoint_is_a_model(tmp_path, one_thread):
    """The first average: loads in `checkpoint.load`, in `load`, samples; and the picture is of it."""
    config = change(TINY, updates=6, checkpoint_every=2, keep=2, sample_every=4)
    made = trainer(config, tmp_path)
    made.fit()
    assert state.numbers(tmp_path / "checkpoints") == [4, 6]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000004.png", "00000006.png"]
    assert Config.read(tmp_path / "config.toml") == config
    for read in (checkpoint.load, load):
        model, schedule, settings = read(tmp_path / "checkpoints" / "00000006")
        assert settings == {"prediction": "v", "method": "ddim", "num_steps": 2}
        assert not model.training
        for name, value in made.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    x = Sampler(model, schedule, **settings)(2, seed=0)
    assert torch.equal(x, Sampler(made.model, made.schedule, **settings)(2, seed=0))
    sheet = np.asarray(Image.open(tmp_path / "samples" / "00000006.png"))
    pixels = Sampler.to_uint8(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(
        sheet[2:34:4, 2:34:4], pixels[0]
    )  # enlarged four times, behind a line of two pixels


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch, one_thread):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder), purge_step))

        def add_scalar(self, *given):
            written.append(given)

        def close(self):
            written.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, board.__name__, board)
    monkeypatch.setattr("ddpm_fast.training.log.find_spec", lambda name: name == "tensorboard")
    trainer(change(TINY, updates=1), tmp_path).fit()
    (line,) = log(tmp_path)
    assert written[0] == (tmp_path / "tensorboard", 1) and written[-1] == "closed"
    assert {(name, value, 1) for name, value in line.items() if name != "update"} == set(written[1:-1])


def test_points(tmp_path, one_thread):
    made = trainer(change(POINTS, updates=3), tmp_path)
    made.fit()
    folder = tmp_path / "checkpoints" / "00000003"
    model, _, settings = load(folder)
    assert settings == {"prediction": "epsilon", "method": "ddpm"}
    assert torch.equal(model.out.weight, made.model.out.weight)
    assert Image.open(tmp_path / "samples" / "00000003.png").size == (132, 132)


def test_a_write_that_fails_leaves_the_one_before(tmp_path, monkeypatch, one_thread):
    made = trainer(change(TINY, updates=10), tmp_path)
    write = checkpoint.write_tensors

    def full(file, tensors):
        write(file, tensors)
        if made.update == 10 and file.name == "training.safetensors":
            file.write_bytes(file.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        made.fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    again = trainer(change(TINY, updates=10), tmp_path, resume="auto")
    assert again.update == 5
    again.fit()
    assert state.numbers(tmp_path / "checkpoints") == [5, 10]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, one_thread):
    trainer(change(TINY, updates=10), tmp_path).fit()
    (tmp_path / "checkpoints" / ".00000010.abc.new").mkdir()
    file = tmp_path / "checkpoints" / "00000010" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = trainer(change(TINY, updates=10), tmp_path, resume="auto")
    assert again.update == 5
    assert "left out, since it cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / ".00000010.abc.new").exists()
    with pytest.raises(ValueError, match="00000010"):
        trainer(TINY, tmp_path / "other", resume=file.parent)


def test_one_may_go_on_longer_and_from_elsewhere(tmp_path, one_thread):
    constant = change(TINY, optimizer=OptimizerConfig(lr=1e-3))
    trainer(change(constant, updates=10), tmp_path / "a").fit()
    trainer(change(constant, updates=5), tmp_path / "b").fit()
    trainer(change(constant, updates=10, keep=1), tmp_path / "b", resume="auto").fit()
    assert_equal(final(tmp_path / "a"), final(tmp_path / "b"))
    resumed = trainer(constant, tmp_path / "c", resume=tmp_path / "a" / "checkpoints" / "00000005")
    assert resumed.update == 5


# What is refused


def test_a_loss_that_is_not_finite(tmp_path, one_thread):
    bad = images()
    made = trainer(change(TINY, log_every=3), tmp_path, images=bad)
    kept = made.images._images
    take, seen = made.images.take, []

    def poisoned(indices):
        seen.append(len(seen))
        return take(indices) * (math.nan if len(seen) == 8 else 1.0)

    made.images.take = poisoned
    with pytest.raises(RuntimeError, match=r"update 8: the loss is nan.* the last checkpoint is .*00000005"):
        made.fit()
    assert bool(kept.isfinite().all())
    assert state.numbers(tmp_path / "checkpoints") == [5] and log(tmp_path)[-1]["update"] == 6
    assert all(bool(value.isfinite().all()) for value in final(tmp_path).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        (
            {"unet": change(UNET, block_out_channels=(16,))},
            "unet.block_out_channels was \\[8\\], is \\[16\\]",
        ),
        ({"ema": (0.9,)}, "ema was"),
        ({"optimizer": OptimizerConfig()}, "optimizer.lr was 0.01, is 0.0002"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, changes, words, one_thread):
    trainer(change(TINY, updates=5), tmp_path).fit()
    with pytest.raises(ValueError, match=words):
        trainer(change(TINY, **changes), tmp_path, resume="auto")
    assert state.numbers(tmp_path / "checkpoints") == [5]


class Net(nn.Module):
    """Anybody's."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, units), nn.Linear(units, 192)

    def forward(self, x, t):
        return self.last(self.first(x.flatten(1)).relu()).reshape(x.shape)


def test_another_model_or_other_images_are_not_resumed(tmp_path, one_thread):
    config = change(TINY, unet=None, updates=5)
    made = trainer(config, tmp_path, model=Net(4))
    made.fit()
    with pytest.raises(ValueError, match=r"is of another model: .* was \(.*4.*\), is \(.*5.*\)"):
        trainer(config, tmp_path, model=Net(5), resume="auto")
    with pytest.raises(ValueError, match="data: the run had"):
        trainer(config, tmp_path, model=Net(4), images=images(8), resume="auto")
    again = trainer(config, tmp_path, model=Net(4), resume="auto")
    assert again.update == 5
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_what_does_not_fit_is_said_first(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(Trainer, "_descend", lambda *_: pytest.fail("work was done"))
    grey = change(TINY, unet=change(UNET, in_channels=1, out_channels=1))
    two = {"processes": Processes(0, 2)}
    points = {"images": torch.randn(5, 2)}
    refused = [
        (
            ValueError,
            "batch must be a multiple of accumulate x processes = 2, got 3",
            change(TINY, batch=3),
            two,
        ),
        (ValueError, r"has shape \(3, 8, 8\), the network's is \(1, 8, 8\)", grey, {}),
        (ValueError, "the config has one", TINY, {"model": nn.Identity()}),
        (ValueError, "neither", change(TINY, unet=None), {}),
        (ValueError, "flip is for images", change(POINTS, flip=True), points),
        (ValueError, "compile=true is for one process", change(TINY, compile=True, accumulate=2), {}),
        (TypeError, "images must be a uint8 or floating Tensor", TINY, {"images": [1]}),
        (ValueError, "images must be finite", TINY, {"images": images() * math.nan}),
        (ValueError, "not empty", TINY, {"images": images()[:0]}),
        (ValueError, "labels are for a U-Net with num_class_embeds", TINY, {"labels": LABELS}),
        (ValueError, "labels must be given with images", CLASSES, {}),
        (
            ValueError,
            "labels go with images",
            change(CLASSES, data="digits"),
            {"images": None, "labels": LABELS},
        ),
        (TypeError, r"labels must be an int64 Tensor of shape \(7,\)", CLASSES, {"labels": LABELS[1:]}),
        (ValueError, "labels must be at least 0, got -1", CLASSES, {"labels": LABELS - 1}),
        (
            ValueError,
            "its labels go up to 3, the network has 3 classes .*, beside the one that stands for none",
            CLASSES,
            {"labels": LABELS + 1},
        ),
        (
            ValueError,
            "label_dropout is for a U-Net with num_class_embeds",
            change(TINY, unet=None, label_dropout=0.1),
            {"model": nn.Identity()},
        ),
        (TypeError, "config must be a Config", {}, {}),
    ]
    for error, words, config, options in refused:
        with pytest.raises(error, match=words):
            Trainer(config, tmp_path / "new", bar=False, **{"images": images()} | options)
    with pytest.raises(FileNotFoundError, match="data: none was given; allowed: a folder of images"):
        Trainer(TINY, tmp_path / "new", bar=False)
    assert not state.numbers(tmp_path / "new" / "checkpoints")


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch, one_thread):
    with pytest.raises(OSError, match=r"/proc/nowhere.* cannot be written"):
        trainer(TINY, "/proc/nowhere")
    usage = state.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="0 MB free, 4 checkpoints need"):
        trainer(TINY, tmp_path)
    monkeypatch.undo()
    trainer(change(TINY, updates=5), tmp_path).fit()
    with pytest.raises(FileExistsError, match="holds a run"):
        trainer(TINY, tmp_path)


# The command


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "train", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_a_preset_trains_and_exports(monkeypatch, tmp_path, capsys, one_thread, diffusers):
    """Some updates of the digits; the folder for diffusers gives what ours gives."""
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    common = ("--preset", "digits", "--out", out, "--device", "cpu", "--set", "batch=4")
    common = (*common, "--set", "samples=2", "--set", "sampling.num_steps=2")
    assert call(monkeypatch, *common, "--updates", 2) == 0
    said = capsys.readouterr()
    assert "00000002: 2 updates in" in said.out and "images/s" in said.err and "loss" in said.err
    assert isinstance(call(monkeypatch, *common, "--updates", 3), str)  # it holds a run
    assert call(monkeypatch, *common, "--updates", 3, "--resume", "auto", "--export", "diffusers") == 0
    assert "00000003: 1 updates in" in capsys.readouterr().out
    model, schedule, settings = checkpoint.load(out / "checkpoints" / "00000003")
    torch.manual_seed(0)
    with torch.no_grad():  # an untrained network predicts zeros
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    checkpoint.save_diffusers(out / "diffusers", model, schedule, settings)
    pipe = diffusers.DDPMPipeline.from_pretrained(out / "diffusers")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        theirs, ours = pipe.unet(x, t).sample, model(x, t)
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    drawn = pipe(2, torch.Generator().manual_seed(0), 4, output_type="np").images
    run = {"method": "ddpm", "num_steps": 4, "prediction": "v"}
    mine = Sampler(model, schedule, **run)(2, noise="torch", generator=torch.Generator().manual_seed(0))
    mine = (mine / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(drawn, mine, atol=1e-4)
    ab = torch.tensor(schedule.alphas_cumprod)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), ab, rtol=1e-4, atol=1e-8)
    again, _, back = checkpoint.load_diffusers(out / "diffusers")
    assert again.config == model.config and back["prediction"] == "v" and back["clip"] == 1.0
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give CONFIG.toml or --preset"),
        (("--preset", "mnist"), "preset must be one of 'cifar10', 'digits', 's-curve', got 'mnist'"),
        (("nowhere.toml",), "nowhere.toml is not a file"),
        (("--preset", "cifar10"), "data: none was given"),
        (("--preset", "cifar10", "--data", "nowhere"), "'nowhere' is neither a folder nor an .npz"),
        (
            ("--preset", "digits", "--set", "optimizer.rate=1"),
            "unknown key 'rate' in [optimizer]; allowed: betas",
        ),
        (("--preset", "digits", "--set", "rate"), "is not KEY=VALUE in TOML"),
        (("--preset", "digits", "--updates", "0"), "updates must be at least 1, got 0"),
        (("--preset", "digits", "--export", "onnx"), "--export 'onnx' is not known; allowed: diffusers"),
        (("--preset", "s-curve", "--export", "diffusers"), "--export is for U-Nets"),
        (("--preset", "digits", "--device", "foo"), "foo"),
        (("--preset", "digits", "--out", "/proc/nowhere"), "cannot be written"),
        (("--preset", "digits", "--resume", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_descend", lambda *_: pytest.fail("work was done"))
    code = call(monkeypatch, *args)
    assert isinstance(code, str) and code.startswith("error: ") and words in code
