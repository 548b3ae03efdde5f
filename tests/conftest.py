"""Shared by all tests: backends that can run here, seeded generators, poisoned outputs."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: its interpreter stands for a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what it starts
    torch.set_num_threads(1)

from ddpm_fast import tuning
from ddpm_fast.ops import _dispatch


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """For processes that tests start: they find nothing in it, and leave nothing in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    """Each layer's way is the one that is known to be fast: the same bits, whatever the machine does."""
    monkeypatch.setattr(tuning, "fastest", lambda of, names, prior, make: prior)


@pytest.fixture
def generator(request) -> torch.Generator:
    """A generator whose seed depends on the test's own name only."""
    seed = sum(ord(c) * 31**k for k, c in enumerate(request.node.name)) % 2**31
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned():
    """Fill every uninitialised tensor with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request) -> str:
    """Every backend; one that is not built here is a skip that says why."""
    reason = _dispatch.why_not("group_norm_silu", request.param, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def diffusers():
    """The peer, where it is installed."""
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install ddpm_fast[test]")


@pytest.fixture
def one_thread():
    """Small ops wait longer for a second thread than they run, most of all on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
