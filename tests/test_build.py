"""Installing with no compiler succeeds and says so; each instruction set's kernels pass the ops' tests."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.ops import _dispatch

ROOT = Path(__file__).parents[1]


def wheel(tmp_path, **environment):
    """Build a wheel of a copy of the sources; the finished process, the wheels."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "wheels")],
        cwd=copy_of_sources(tmp_path),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, list((tmp_path / "wheels").glob("*.whl"))


def copy_of_sources(tmp_path) -> Path:
    """What a clone has: no build folder, no library."""
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: no list of the sources")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


NO_COMPILER = {"CXX": "/nowhere/c++"}


def test_without_a_compiler_it_installs_says_so_and_runs(tmp_path):
    done, wheels = wheel(tmp_path, DDPM_FAST_NATIVE="auto", **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT BUILDING the compiled library" in done.stdout + done.stderr
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheels[0])],
        check=True,
        capture_output=True,
    )
    program = (
        "import torch, ddpm_fast\n"
        "print(ddpm_fast.__file__)\n"
        "print(ddpm_fast.info()['backends']['group_norm_silu on cpu'])\n"
        "op = torch.ops.ddpm_fast.group_norm_silu\n"
        "op(torch.randn(1, 8, 4, 4), 4, None, None, 1e-5, None, None, None, True)\n"
        "sampler = ddpm_fast.Sampler(lambda x, t: x, ddpm_fast.Schedule.linear(), num_steps=3)\n"
        "print(sampler(2, shape=(3, 4, 4)).isfinite().all().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, backend, finite = done.stdout.splitlines()
    assert where.startswith(str(target)) and finite == "True"
    assert backend.startswith("reference (the compiled library is missing")
    assert "RuntimeWarning: ddpm_fast runs without its compiled library" in done.stderr


def test_a_required_library_is_required(tmp_path):
    done, wheels = wheel(tmp_path, DDPM_FAST_NATIVE="require", **NO_COMPILER)
    assert done.returncode != 0 and not wheels


def test_an_unknown_wish_is_named(tmp_path):
    done, wheels = wheel(tmp_path, DDPM_FAST_NATIVE="maybe")
    assert done.returncode != 0 and not wheels
    assert "DDPM_FAST_NATIVE='maybe' is not known; allowed: auto, require, skip" in done.stdout + done.stderr


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_passes(isa):
    """The best one runs in the other tests; the others are forced, each in its own process."""
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is an instruction set of x86-64")
    program = "import torch; from ddpm_fast import info; print(info()['cpu kernels'])"
    environment = os.environ | {"DDPM_FAST_CPU": isa}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if "this processor does not run it" in done.stdout:
        pytest.skip(f"this processor does not run {isa}")
    assert done.stdout.startswith(f"{isa} (built for "), done.stderr
    names = "native and (against_float64 or nan or in_place or matches or lane or counter)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_ops.py", "tests/test_noise.py", "-q", "-k", names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_named():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    environment = os.environ | {"DDPM_FAST_CPU": "sse9"}
    words = "DDPM_FAST_CPU=sse9 is not known; built for: "
    for command in ("info", "sample"):
        run = [sys.executable, "-m", "ddpm_fast", command]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
