"""Imports run one way, and foreign libraries are named only where they are spoken."""

from __future__ import annotations

import ast
from pathlib import Path

import ddpm_fast

PACKAGE = Path(ddpm_fast.__file__).parent

# Each room may import those before it (and a folder's files each other).
ORDER = (
    {"schedule", "reference", "unet_config"},
    {"ops._triton"},
    {"ops"},
    {"files"},
    {"tuning"},
    {"convolution"},
    {"fusion"},
    {"unet", "losses", "noise", "steps"},
    {"guidance", "replay", "threads"},
    {"engine"},
    {"cuda_graph"},
    {"run", "stream"},
    {"sampler"},
    {"likelihood"},
    {"checkpoint", "info", "pictures"},
    {"training"},
    {"compat"},
    {"bench"},
    {"experiments"},
    {"cli"},
    {"__main__", ""},
)
FOREIGN = {
    "denoising_diffusion_pytorch",
    "diffusers",
    "guided_diffusion",
    "improved_diffusion",
    "onnxruntime",
    "openvino",
    "transformers",
}


def room(module: str) -> str:
    """`ops.q_sample` lives in `ops`; `ops._triton.q_sample` in `ops._triton`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[:2] == ["ops", "_triton"] else parts[0]


def rank(module: str) -> int:
    ranks = [k for k, rooms in enumerate(ORDER) if room(module) in rooms]
    assert ranks, f"ddpm_fast/{module} is in no room of ORDER"
    return ranks[0]


def imports(path: Path):
    """(module within the package or None, top-level foreign name or None) of each import statement."""
    package = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from split(alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield from split(node.module)
                continue
            base = package[: len(package) - node.level]
            if node.module:
                yield ".".join((*base, node.module)), None
            else:
                for alias in node.names:
                    yield ".".join((*base, alias.name)), None


def split(name: str):
    if name.split(".")[0] == "ddpm_fast":
        yield name.removeprefix("ddpm_fast").lstrip("."), None
    else:
        yield None, name.split(".")[0]


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield module.removesuffix("__init__").rstrip("."), path


def test_imports_run_one_way():
    for module, path in files():
        for imported, _ in imports(path):
            if imported is None or room(imported) == room(module):
                continue
            assert rank(imported) < rank(module), f"{path.name} imports {imported}"


def test_the_reference_knows_torch_only():
    names = {foreign for _, foreign in imports(PACKAGE / "reference.py")}
    assert names <= {"torch", "math", "collections", "__future__"}
    assert all(module is None for module, _ in imports(PACKAGE / "reference.py"))


def test_ops_know_no_schedule_and_no_sampler():
    for module, path in files():
        if room(module) in ("ops", "ops._triton"):
            assert {m for m, _ in imports(path) if m} <= {"reference", ""} | {
                m for m, _ in imports(path) if m and room(m) in ("ops", "ops._triton")
            }


def test_foreign_libraries_are_named_in_compat_only():
    for module, path in files():
        named = {foreign for _, foreign in imports(path)} & FOREIGN
        assert not named or room(module) == "compat", f"{path.name} imports {named}"


def test_there_is_no_utils():
    assert not [path for _, path in files() if path.stem in ("utils", "helpers", "misc", "common")]
