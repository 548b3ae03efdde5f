"""Tests on an instruction set that is not the best one here: forced, in a process of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def needs_x86(isa: str) -> None:
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is an instruction set of x86-64")


def pass_on(isa: str, files: tuple[str, ...], names: str) -> None:
    """The tests of these files whose names match, on ``isa``."""
    needs_x86(isa)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(f"tests/{file}" for file in files), "-q", "-k", names],
        cwd=ROOT,
        env=os.environ | {"DDPM_FAST_CPU": isa},
        capture_output=True,
        text=True,
    )
    if "this processor does not run it" in done.stdout:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout[-3000:]
