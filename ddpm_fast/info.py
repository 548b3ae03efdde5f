"""What runs here: versions, devices, the compiled library, and the backend of each op with its reason."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from .ops import _dispatch


def info() -> dict[str, Any]:
    """Versions, devices, whether the libraries were built, which instruction set runs, and backends.

    ``backends`` maps each op and device to the backend that runs float32 there and why.
    """
    devices = ["cpu"] + [
        f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())
    ]
    missing, cuda_missing = _dispatch.NATIVE_MISSING, _dispatch.CUDA_MISSING
    direct_missing = _dispatch.DIRECT_MISSING
    return {
        "ddpm_fast": version("ddpm_fast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "library": str(_dispatch.LIBRARY_FILE) if missing is None else f"none: {missing}",
        "cuda library": str(_dispatch.CUDA_LIBRARY_FILE) if cuda_missing is None else f"none: {cuda_missing}",
        "cpu kernels": _dispatch.cpu_kernels(),
        "past the dispatcher": "group norms" if direct_missing is None else f"none: {direct_missing}",
        "backends": {
            f"{op} on {device}": _backend(op, device)
            for op in _dispatch.OPS
            for device in dict.fromkeys(d.split(":")[0] for d in devices)
        },
    }


def _backend(op: str, device: str) -> str:
    forced, dtype = _dispatch.FORCED_BACKEND, torch.float32
    if forced is not None and forced not in _dispatch.BACKENDS:
        return f"none: DDPM_FAST_BACKEND={forced!r} is not known"
    if forced is not None:
        reason = _dispatch.why_not(op, forced, device, dtype)
        return f"{forced} (DDPM_FAST_BACKEND)" + (f", which cannot run: {reason}" if reason else "")
    chosen = _dispatch.FASTEST.get((op, device, dtype), "reference")
    if chosen == "reference":
        why = _dispatch.why_not(op, "native", device, dtype)
    elif device == "cpu":
        why = "the fastest that was measured"
    else:
        why = "moves the fewest bytes; its time is not measured"
    return f"{chosen} ({why})"
