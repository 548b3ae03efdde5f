"""Which code runs an op: loads the compiled libraries that exist, and chooses a backend, in one place."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

BACKENDS: tuple[str, ...] = ("native", "triton", "reference")

LIBRARY = torch.library.Library("ddpm_fast", "DEF")
LIBRARY_FILE = Path(__file__).parent.parent / "_C.abi3.so"
CUDA_LIBRARY_FILE = Path(__file__).parent.parent / "_C_cuda.abi3.so"  # apart: it needs a torch with CUDA

_HALVES_AND_FLOAT = frozenset({torch.float32, torch.bfloat16, torch.float16})
_KERNELS: dict[tuple[str, str, str], frozenset[torch.dtype]] = {
    # (op, backend, device type): the dtypes it takes. The reference takes everything, everywhere.
    ("q_sample", "native", "cpu"): _HALVES_AND_FLOAT | {torch.float64},
    ("posterior_step", "native", "cpu"): _HALVES_AND_FLOAT | {torch.float64},
    ("group_norm_silu", "native", "cpu"): _HALVES_AND_FLOAT,
    ("counter_normal", "native", "cpu"): frozenset({torch.float32}),
    ("conv3x3", "native", "cpu"): frozenset({torch.float32, torch.bfloat16}),
    ("dropout", "native", "cpu"): _HALVES_AND_FLOAT,
    ("linear", "native", "cpu"): frozenset({torch.float32, torch.bfloat16}),
    ("attention", "native", "cpu"): frozenset({torch.float32, torch.bfloat16}),
    ("fingerprint", "native", "cpu"): _HALVES_AND_FLOAT | {torch.float64},
    ("q_sample", "native", "cuda"): _HALVES_AND_FLOAT,
    ("posterior_step", "native", "cuda"): _HALVES_AND_FLOAT,
    ("group_norm_silu", "native", "cuda"): _HALVES_AND_FLOAT,
    ("counter_normal", "native", "cuda"): frozenset({torch.float32}),
    ("q_sample", "triton", "cuda"): _HALVES_AND_FLOAT,
    ("posterior_step", "triton", "cuda"): _HALVES_AND_FLOAT,
    ("group_norm_silu", "triton", "cuda"): _HALVES_AND_FLOAT,
    ("counter_normal", "triton", "cuda"): frozenset({torch.float32}),
}
OPS: tuple[str, ...] = tuple(dict.fromkeys(op for op, _, _ in _KERNELS))


def _load(file: Path, built_without: str) -> str | None:
    """Load a compiled library; None if that went well, else the reason."""
    if not file.exists():
        return f"it was not built when ddpm_fast was installed ({built_without})"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"it does not load ({error})"
    return None


def _load_native() -> str | None:
    """The reason is warned of, once: without this library every machine is slower."""
    reason = _load(LIBRARY_FILE, "no C++ compiler, or DDPM_FAST_NATIVE=skip")
    if reason is not None:
        warnings.warn(
            f"ddpm_fast runs without its compiled library: {reason}. Every op works in plain PyTorch, "
            "slower. Install a C++ compiler (g++ or clang++) and reinstall ddpm_fast.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _load_cuda() -> str | None:
    """Whether there is a device is not asked: that would initialise CUDA, and a process could not fork."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return _load(CUDA_LIBRARY_FILE, "no nvcc of torch's CUDA, or DDPM_FAST_CUDA=skip")


NATIVE_MISSING: str | None = _load_native()
CUDA_MISSING: str | None = _load_cuda()
TRITON_INSTALLED: bool = find_spec("triton") is not None
FORCED_BACKEND: str | None = os.environ.get("DDPM_FAST_BACKEND") or None


_WATCHERS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
)


def is_watched() -> bool:
    """Whether somebody wants to see the ops: a mode, a transform, a tracer or a profiler."""
    return any(watches() for watches in _WATCHERS)


def _load_direct() -> tuple[Any, str | None]:
    """The compiled library as a Python module, whose functions go past PyTorch's dispatcher; or None and why.

    They do not run where somebody wants to see the op, see `is_watched`.
    """
    if NATIVE_MISSING is not None:
        return None, "there is no library"
    try:
        direct = import_module("._C", __package__.rpartition(".")[0])
    except ImportError:
        return None, "the library was built without Python's headers"
    if not direct.set_up(Tensor, torch.nn.Parameter, _WATCHERS):
        return None, "torch is older than 2.14"
    return direct, None


_DIRECT, DIRECT_MISSING = _load_direct()
PROGRAM_OPS: frozenset[str] = frozenset() if _DIRECT is None else frozenset(_DIRECT.program_ops())
"""The ops that `direct("program")` makes one function of: see `replay.program`."""


def direct(name: str) -> Callable[..., Any]:
    """A function of the compiled library that runs an op on plain tensors on the CPU; None of others.

    Small ops take longer to be called by the dispatcher than to run.
    """
    return getattr(_DIRECT, name, lambda *_: None)


def goes_direct(backend: str | None) -> bool:
    """Whether `direct` may be asked: the native backend is not ruled out, and no compiler traces the call."""
    named = backend if backend is not None else FORCED_BACKEND
    return (
        (named is None or named == "native")
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
    )


@cache
def cpu_kernels() -> str:
    """The instruction set of the compiled CPU kernels in use, and those that they were built for."""
    if NATIVE_MISSING is not None:
        return "none"
    name = ctypes.CDLL(str(LIBRARY_FILE)).ddpm_fast_cpu_kernels
    name.restype = ctypes.c_char_p
    return name().decode()


_OVERLOADS: dict[tuple[str, str], Callable[..., Any]] = {}


def define(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    file: str,
    autograd: Callable[[str], tuple[Callable[..., Any], Callable[..., Any]]] | None = None,
) -> None:
    """Register an op twice, under one schema and fake.

    `op` runs the compiled kernel of the device, and the plain-PyTorch one where there is none; `op_triton`
    the launcher of the same name in `_triton/file.py`. `autograd` gives (backward, setup_context) by the
    suffix of the name; an op that has it is also registered without, as `op_forward`, for calls that need no
    gradient, and for those whose gradient a `torch.autograd.Function` holds: see `differentiable`.
    """

    def triton(*args: Any) -> Any:
        return getattr(import_module(f"._triton.{file}", __package__), op)(*args)

    kernels = {"": ("native", reference), "_triton": ("triton", triton)}
    if autograd is not None:
        kernels["_forward"] = ("forward", reference)
    for suffix, (backend, kernel) in kernels.items():
        name = op + suffix
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{name}", fake, lib=LIBRARY)
        if autograd is not None and backend != "forward":
            backward, setup = autograd(suffix)
            torch.library.register_autograd(f"ddpm_fast::{name}", backward, setup_context=setup, lib=LIBRARY)
        _OVERLOADS[op, backend] = getattr(torch.ops.ddpm_fast, name).default
    if autograd is not None:
        _OVERLOADS[op, "function"] = _function(_OVERLOADS[op, "forward"], *autograd(""))


def _function(
    run: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., Any]
) -> Callable[..., Any]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args: Any) -> Any:
            output = run(*args)
            setup(ctx, args, output)
            return output

    Function.backward = staticmethod(once_differentiable(backward))
    return Function.apply


def implementation(op: str, backend: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What a chosen backend calls: a registered op, or the reference itself, which autograd sees through.

    So do `torch.func` and forward mode, which get the reference whatever was chosen: to them the derivative
    of an op would be zero.
    """
    if is_transformed():
        return reference
    return reference if backend == "reference" else _OVERLOADS[op, backend]


def is_transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, which see PyTorch's own operations only."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def differentiable(op: str, backend: str, reference: Callable[..., Any], *given: Tensor | None):
    """`implementation` of an op with an autograd, which is left out where none of `given` needs a gradient.

    An autograd that is registered from Python takes 4 us even then, and 70 us forward and backward where
    there is a gradient; a `torch.autograd.Function` takes 35. Only the CPU's kernels go round it: a tracer
    sees the op itself, and CUDA has no `op_forward`.
    """
    if backend == "native" and given[0].is_cpu and not torch.compiler.is_compiling():
        needed = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)
        backend = "function" if needed else "forward"
    return implementation(op, backend, reference)


def why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason that a backend cannot run an op on such a tensor, None if it can."""
    if backend == "reference":
        return None
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        device = "cuda"  # Triton's interpreter runs the same kernels on the host
    dtypes = _KERNELS.get((op, backend, device))
    if dtypes is None:
        return f"it has no {op} kernel for {device} tensors"
    if dtype not in dtypes:
        return f"its {op} kernel takes {', '.join(sorted(map(str, dtypes)))}, not {dtype}"
    if backend == "native" and device == "cpu" and NATIVE_MISSING is not None:
        return f"the compiled library is missing: {NATIVE_MISSING}"
    if backend == "native" and device == "cuda" and CUDA_MISSING is not None:
        return f"the compiled CUDA library is missing: {CUDA_MISSING}"
    if backend == "triton" and not TRITON_INSTALLED:
        return "triton is not installed"
    return None


# By device type: the backends in the order in which they are asked where none is named. On the CPU by the
# times of `ddpm-fast bench ops`; on CUDA no time is measured, and both move the same bytes.
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("triton", "native")}


def _fastest(op: str, device: str, dtype: torch.dtype) -> str:
    can = (backend for backend in _ORDER[device] if why_not(op, backend, device, dtype) is None)
    return next(can, "reference")


# By (op, device type, dtype): what runs where no backend is named. Everything else is the reference's.
FASTEST: dict[tuple[str, str, torch.dtype], str] = {
    (op, device, dtype): _fastest(op, device, dtype)
    for (op, _, device), dtypes in _KERNELS.items()
    for dtype in dtypes
}


def choose(op: str, backend: str | None, x: Tensor) -> str:
    """The backend that runs `op` on `x`: the one named, else DDPM_FAST_BACKEND's, else the fastest that can.

    Raises ValueError for a name that is none, RuntimeError for a backend that is named and cannot run: a
    forced choice is never substituted.
    """
    named = backend if backend is not None else FORCED_BACKEND
    if named is None:
        return FASTEST.get((op, "cpu" if x.is_cpu else x.device.type, x.dtype), "reference")
    if named not in BACKENDS:
        name = "DDPM_FAST_BACKEND" if backend is None else "backend"
        raise ValueError(f"{name}={named!r} is not known; allowed: {', '.join(BACKENDS)} or None")
    reason = why_not(op, named, x.device.type, x.dtype)
    if reason is not None:
        raise RuntimeError(f"backend {named!r} cannot run {op} here: {reason}")
    return named


def runs_native(op: str, x: Tensor) -> bool:
    """Whether `choose` without a name is "native"; for layers with another way, nothing is raised."""
    kind = "cpu" if x.is_cpu else x.device.type
    return FORCED_BACKEND in (None, "native") and FASTEST.get((op, kind, x.dtype)) == "native"
