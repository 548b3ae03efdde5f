"""Installing without a compiler or nvcc succeeds and says so; each instruction set passes the ops' tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import needs_x86, pass_on

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


@pytest.mark.parametrize("name", ["DDPM_FAST_NATIVE", "DDPM_FAST_CUDA"])
def test_an_unknown_wish_is_named(name, tmp_path):
    done, wheels = wheel(tmp_path, **{name: "maybe"})
    assert done.returncode != 0 and not wheels
    assert f"{name}='maybe' is not known; allowed: auto, require, skip" in done.stdout + done.stderr


# ---- the CUDA library ----


def configure(tmp_path, torch_root, wish, **environment):
    """CMake's own answer, without building."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    command += [f"-DTORCH_ROOT={torch_root}", f"-DDDPM_FAST_CUDA={wish}"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def torch_with_cuda(tmp_path) -> Path:
    """As much of a torch of CUDA 13 as CMake looks at."""
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "lib/libtorch_cuda.so"):
        (tmp_path / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / name).touch()
    (tmp_path / "torch" / "version.py").write_text(
        "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    return tmp_path / "torch"


NO_NVCC = {"CUDACXX": "/nowhere/nvcc"}


def test_without_nvcc_there_is_no_cuda_library_and_one_line_says_so(tmp_path, torch_with_cuda):
    done = configure(tmp_path, torch_with_cuda, "AUTO", **NO_NVCC)
    assert done.returncode == 0, done.stderr
    assert "-- CUDA C++ is not built: CMake finds no CUDA compiler that works (nvcc)\n" in done.stdout


def test_a_torch_without_cuda_gets_none(tmp_path, torch_with_cuda):
    (torch_with_cuda / "version.py").write_text("cuda: Optional[str] = None\nhip: Optional[str] = None\n")
    done = configure(tmp_path, torch_with_cuda, "AUTO")
    assert done.returncode == 0 and "-- CUDA C++ is not built: this torch has no CUDA\n" in done.stdout


def test_a_torch_of_another_cuda_gets_none(tmp_path, torch_with_cuda):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    (torch_with_cuda / "version.py").write_text("cuda: Optional[str] = '11.8'\n")
    done = configure(tmp_path, torch_with_cuda, "AUTO")
    assert done.returncode == 0 and "torch is of CUDA 11\n" in done.stdout


def test_a_required_cuda_library_is_required(tmp_path, torch_with_cuda):
    done = configure(tmp_path, torch_with_cuda, "ON", **NO_NVCC)
    assert done.returncode != 0
    assert "DDPM_FAST_CUDA=ON, but CMake finds no CUDA compiler that works" in done.stderr
    assert "CUDA C++ is not built" not in done.stdout


def test_a_library_that_does_not_load_is_a_reason_and_no_warning(tmp_path, monkeypatch, recwarn):
    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_dispatch, "CUDA_LIBRARY_FILE", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _dispatch._load_cuda().startswith("it does not load (")
    broken.unlink()
    assert _dispatch._load_cuda() == (
        "it was not built when ddpm_fast was installed (no nvcc of torch's CUDA, or DDPM_FAST_CUDA=skip)"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _dispatch._load_cuda() == "this torch has no CUDA"
    monkeypatch.setattr(_dispatch, "CUDA_MISSING", "this torch has no CUDA")
    reason = _dispatch.why_not("q_sample", "native", "cuda", torch.float32)
    assert reason == "the compiled CUDA library is missing: this torch has no CUDA"
    assert not recwarn.list


def test_on_cuda_triton_comes_first_then_the_library(monkeypatch):
    """An order, since no time is measured there."""
    monkeypatch.setattr(_dispatch, "CUDA_MISSING", None)
    monkeypatch.setattr(_dispatch, "TRITON_INSTALLED", True)
    assert _dispatch._fastest("q_sample", "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(_dispatch, "TRITON_INSTALLED", False)
    assert _dispatch._fastest("q_sample", "cuda", torch.bfloat16) == "native"
    monkeypatch.setattr(_dispatch, "CUDA_MISSING", "it was not built")
    assert _dispatch._fastest("q_sample", "cuda", torch.bfloat16) == "reference"
    assert "cpu" not in {device for _, backend, device in _dispatch._KERNELS if backend == "triton"}


# ---- instruction sets ----


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_passes(isa):
    """The best one runs in the other tests; the others are forced, each in its own process."""
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    needs_x86(isa)
    program = "import torch; from ddpm_fast import info; print(info()['cpu kernels'])"
    environment = os.environ | {"DDPM_FAST_CPU": isa}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if "this processor does not run it" in done.stdout:
        pytest.skip(f"this processor does not run {isa}")
    assert done.stdout.startswith(f"{isa} (built for "), done.stderr
    names = "native and (against_float64 or nan or in_place or matches or lane or counter)"
    pass_on(isa, ("test_ops.py", "test_noise.py"), names)


def test_an_unknown_instruction_set_is_named():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    environment = os.environ | {"DDPM_FAST_CPU": "sse9"}
    words = "DDPM_FAST_CPU=sse9 is not known; built for: "
    for command in ("info", "sample"):
        run = [sys.executable, "-m", "ddpm_fast", command]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
