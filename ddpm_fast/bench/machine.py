"""What a figure was measured on, for its table: the processor, the versions, what oneDNN runs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..info import info
from ..tuning import processor

PACKAGES = ("numpy", "diffusers", "openvino", "onnxruntime", "denoising-diffusion-pytorch", "triton")

_CONVOLUTION = """
import torch
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(1, 128, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.conv2d(x, weight, padding=1)
"""


def machine(device: torch.device) -> dict[str, Any]:
    """Names and numbers that JSON can hold; nothing that says whose machine it is."""
    about = info()
    found: dict[str, Any] = {
        "processor": processor(),
        "processors": _processors(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "ddpm_fast": about["ddpm_fast"],
        },
        "kernels": about["cpu kernels"],
        "backends": about["backends"],
        "onednn": onednn(),
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found


def summary(found: dict[str, Any]) -> str:
    """`machine`'s in a line: what belongs under a table."""
    onednn, versions = found["onednn"], found["versions"]
    parts = [
        found["device"] if found["device"] != "cpu" else found["processor"],
        f"{found['processors']} processors, {found['threads']} threads",
        f"torch {versions['torch']}",
        *(f"{name} {versions[name]}" for name in PACKAGES[1:5] if versions[name]),
        *([f"oneDNN {onednn['version']}, {onednn['float32 convolution']}"] if "version" in onednn else []),
    ]
    return "; ".join(parts)


def onednn() -> dict[str, str]:
    """Its version, its instruction set, and the implementation of a 3x3 convolution, by its own report.

    It reports to the standard output of a process; so another one makes a convolution. Empty without oneDNN.
    """
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CONVOLUTION], env=environment, capture_output=True, text=True, timeout=300
    )
    found = {}
    if match := re.search(r"oneDNN v([\w.]+)", done.stdout):
        found["version"] = match[1]
    if match := re.search(r"cpu,isa:(.+)", done.stdout):
        found["isa"] = match[1].strip()
    runs = re.findall(r"exec,cpu,convolution,([^,]+),", done.stdout)
    for dtype, name in zip(("float32", "bfloat16"), runs, strict=False):
        found[f"{dtype} convolution"] = name
    return found


def _processors() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
