"""One update, as it is and as one compiled graph: the same numbers, the same state."""

from __future__ import annotations

import copy

import pytest
import torch
from test_graph_safety import Refuse
from torch import nn

from ddpm_fast import Schedule
from ddpm_fast.losses import Loss, antithetic
from ddpm_fast.ops import _dispatch
from ddpm_fast.training import TrainStep

T = 10
CLIP = 0.8  # some norms are above and some below
SCHEDULE = Schedule.sigmoid_betas(T, 1e-3, 0.3)


class Net(nn.Module):
    """With all that a graph could get wrong: buffers that move, parameters that are frozen or not used."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(T, 8)
        self.first, self.norm, self.last = nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.frozen = nn.Parameter(torch.full((8,), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x, t):
        h = self.norm(self.first(x) + self.time(t))
        return self.last(torch.tanh(h * self.frozen))


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adam-decay": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
}


def groups(model: Net):
    """Two, with their own rates, as a schedule and a decay by kind of parameter make them."""
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return [{"params": rest}, {"params": biases, "lr": 3e-2, "weight_decay": 0.0}]


def make(optimizer: str, compile: bool, clip: float | None = CLIP) -> TrainStep:
    torch.manual_seed(0)
    model = Net()
    return TrainStep(model, Loss(SCHEDULE), OPTIMIZERS[optimizer](groups(model)), clip=clip, compile=compile)


def train(step: TrainStep, updates: range, batch: int = 16) -> torch.Tensor:
    found = []
    for k in updates:
        g = torch.Generator().manual_seed(k)
        x0, t = torch.randn(batch, 2, generator=g), antithetic(batch, T, generator=g)
        step.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + k)
        weight = torch.rand(batch, generator=g)
        found.append(torch.stack(step(x0, t, seed=7, image_index=k * batch, weight=weight)))
    return torch.stack(found)


def compare(a: TrainStep, b: TrainStep) -> None:
    for name, value in a.model.state_dict().items():
        torch.testing.assert_close(b.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    mine, theirs = (step.optimizer.state_dict()["state"] for step in (a, b))
    assert mine.keys() == theirs.keys()
    for k, state in mine.items():
        for name, value in state.items():
            torch.testing.assert_close(theirs[k][name], value, rtol=1e-4, atol=1e-7, msg=f"{k} {name}")


def needs_a_compiler() -> None:
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(f"inductor needs a C++ compiler: {_dispatch.NATIVE_MISSING}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_is_torchs(optimizer):
    """The plain loop, and the step, in the same order of the same ops: bit for bit."""
    step = make(optimizer, False)
    other = make(optimizer, False)
    found = train(step, range(5))
    expected = []
    for k in range(5):
        g = torch.Generator().manual_seed(k)
        x0, t = torch.randn(16, 2, generator=g), antithetic(16, T, generator=g)
        other.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + k)
        weight = torch.rand(16, generator=g)
        other.optimizer.zero_grad()
        loss = (weight * other.loss(other.model, x0, t, seed=7, image_index=16 * k)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for g in groups(other.model) for p in g["params"]], CLIP)
        other.optimizer.step()
        expected.append(torch.stack([loss.detach(), norm]))
    assert torch.equal(found, torch.stack(expected))
    for p, q in zip(step.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["adam-decay", "adamw-fused"])  # the other is the next test's
def test_compiled_it_is_the_same(optimizer, one_thread):
    needs_a_compiler()
    plain, compiled = make(optimizer, False), make(optimizer, True)
    before = torch.get_rng_state()
    got, expected = train(compiled, range(12)), train(plain, range(12))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert expected[1:, 1].min() < CLIP < expected[1:, 1].max()
    assert torch.equal(torch.get_rng_state(), before)  # to compile draws nothing: a run that resumes repeats
    compare(plain, compiled)
    assert len(compiled._compiled) == 1
    assert compiled.model.unused not in compiled.optimizer.state


def test_a_checkpoint_goes_from_one_to_the_other(one_thread):
    """The state that was loaded last is the one that is used; a batch of another size is another graph."""
    needs_a_compiler()
    plain, compiled = make("adam", False), make("adam", True)
    train(plain, range(4))
    train(compiled, range(3))  # another history, which is to be forgotten
    compiled.model.load_state_dict(copy.deepcopy(plain.model.state_dict()))
    compiled.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    torch.testing.assert_close(train(compiled, range(4, 8)), train(plain, range(4, 8)), rtol=1e-5, atol=1e-6)
    compare(plain, compiled)
    got, expected = (train(step, range(8, 10), batch=5) for step in (compiled, plain))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(compiled._compiled) == 2


def test_parts_are_the_whole():
    """Without the batch norm, whose statistics are a part's own."""
    found = []
    for size in (16, 4):
        step = make("adam", False)
        step.model.norm = nn.Identity()
        x0, t = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.arange(16) % T
        losses = [
            step.backward(x0[k : k + size], t[k : k + size], share=size / 16, seed=0, image_index=k)
            for k in range(0, 16, size)
        ]
        found.append((torch.stack(losses).sum(), step.finish(), step.model.first.weight.detach()))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_is_around_the_model(compile, one_thread):
    if compile:
        needs_a_compiler()
    plain, half = make("adam", False), make("adam", compile)
    half.autocast = torch.bfloat16
    got, expected = train(half, range(3)), train(plain, range(3))
    assert got.dtype == torch.float32 and not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_an_update_asks_the_host_nothing():
    torch.manual_seed(0)
    model = Net()
    step = TrainStep(model, Loss(SCHEDULE), torch.optim.AdamW(model.parameters(), fused=True), clip=1.0)
    x0, t, seed, images = torch.randn(8, 2), torch.arange(8), torch.tensor(0), torch.arange(8)
    with Refuse():
        step(x0, t, seed=seed, image_index=images)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"model": lambda x, t: x}, TypeError, "model must be of type Module"),
        ({"loss": nn.MSELoss()}, TypeError, "loss must be of type Loss"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be of type Optimizer"),
        ({"clip": 0.0}, ValueError, "clip must be None or above 0"),
        ({"autocast": torch.float16}, ValueError, "autocast must be None or bfloat16"),
        ({"compile": 1}, TypeError, "compile must be of type bool"),
        ({"compile": True, "observe": print}, ValueError, "compile=True takes no observe"),
        ({"compile": True, "optimizer": "sgd"}, ValueError, "takes torch's Adam or AdamW, got SGD"),
        ({"compile": True, "optimizer": "amsgrad"}, ValueError, "without amsgrad"),
        (
            {"compile": True, "optimizer": "half"},
            ValueError,
            "float32 or float64 parameters, got torch.bfloat16",
        ),
    ],
)
def test_bad_input_is_named(given, error, match):
    model = Net()
    made = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "amsgrad": lambda: torch.optim.Adam(model.parameters(), amsgrad=True),
        "half": lambda: torch.optim.Adam(copy.deepcopy(model).bfloat16().parameters()),
    }
    optimizer = given.get("optimizer")
    optimizer = made[optimizer]() if optimizer in made else optimizer or torch.optim.Adam(model.parameters())
    given = {"model": model, "loss": Loss(SCHEDULE)} | given | {"optimizer": optimizer}
    with pytest.raises(error, match=match):
        TrainStep(**given)
