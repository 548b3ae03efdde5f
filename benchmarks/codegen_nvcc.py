"""What nvcc makes of the CUDA C++ kernels, for four architectures and with no GPU:

    python -m benchmarks.codegen_nvcc [--arch 80 90 100 120] [--only NAME] [--json FILE] [--write-budget]

As in the library's build a file is compiled to PTX once, and that to code for each architecture. The rows are
the instantiations that aligned CIFAR-10 shapes use, and their large-image siblings; figures as in `codegen`,
except that shared memory is what a kernel declares, without what its launch adds. Of all the others only
whether they spill is told.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .figures import ARCHITECTURES, BUDGET, Figures, Rows, as_json, show, wide_share, write, write_budget

KERNELS = Path(__file__).parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")


@dataclass(frozen=True)
class Case:
    file: str
    kernel: str
    """A pattern of the instantiations' names."""
    wide: float = 0.9
    """The least share of bytes in 128-bit accesses; lower only where a layout forbids them."""


NORM = r"<(float, 4|__nv_bfloat16, 8), .*>"  # the type, and the elements of an access
CASES = [
    Case("counter_normal", r"counter_normal_kernel<true>"),
    Case("q_sample", r"q_sample_kernel<.*, true>"),
    Case("q_sample", r"q_sample_counter_kernel<.*, true>"),
    Case("q_sample", r"q_sample_counter_kernel<__nv_bfloat16, 4, false>", wide=0),  # channels_last
    Case("posterior_step", r"posterior_step_kernel<.*, true, true>"),
    Case("posterior_step", r"posterior_step_kernel<.*, true, false>", wide=0.7),  # out in channels_last
    # Pixels move 16 bytes at a time. What is by channel (operands, each counted in all four of its dtypes;
    # sums) moves by few threads, which counting by instruction takes for all.
    Case("group_norm_silu", rf"(resident|apply)_kernel{NORM}", wide=0.7),
    Case("group_norm_silu", rf"partials_kernel{NORM}", wide=0.55),
    Case("group_norm_silu_backward", rf"(resident_backward|apply|sums)_kernel{NORM}", wide=0.55),
]


def version() -> str:
    told = subprocess.run([NVCC, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", told)[1]


def demangled(names: list[str]) -> list[str]:
    told = subprocess.run(["c++filt", "-p", *names], check=True, capture_output=True, text=True).stdout
    return [name.replace("ddpm_fast::cuda::(anonymous namespace)::", "") for name in told.splitlines()]


def to_ptx(file: str, folder: Path) -> Path:
    ptx = folder / f"{file}.ptx"
    command = [NVCC, *FLAGS, "-ptx", "-arch=compute_80", str(KERNELS / f"{file}.cu"), "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    return ptx


def usage(ptx: Path, arch: int) -> dict[str, dict[str, int]]:
    """Mangled name -> what ptxas says it uses."""
    command = [NVCC, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", str(ptx), "-o", f"{ptx}.{arch}.cubin"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", told, re.S):

        def number(words: str, text: str = text) -> int:
            match = re.search(words, text)
            return int(match[1]) if match else 0

        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spilled": number(r"(\d+) bytes stack frame") + number(r"(\d+) bytes spill stores"),
            "shared": number(r"(\d+) bytes smem"),
            "barriers": number(r"used (\d+) barriers"),
        }
    return found


def entries(ptx: str) -> dict[str, str]:
    """Mangled name -> the kernel's own PTX."""
    parts = re.split(r"^\s*(?:\.visible |\.weak )?\.entry ", ptx, flags=re.M)[1:]
    return {re.match(r"\w+", part)[0]: part for part in parts}


def report(architectures=ARCHITECTURES, only: str = "") -> tuple[Rows, dict[str, float], list[str]]:
    """The rows; the least share of wide accesses where it is not 0.9; which of all the kernels spill."""
    rows: Rows = {}
    floors: dict[str, float] = {}
    spilling: list[str] = []
    files = [file for file in dict.fromkeys(case.file for case in CASES) if only in file]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda file: to_ptx(file, Path(folder)), files))
        jobs = [
            (file, ptx, arch) for file, ptx in zip(files, compiled, strict=True) for arch in architectures
        ]
        used = list(pool.map(lambda job: usage(job[1], job[2]), jobs))
        by_file = {file: entries(ptx.read_text()) for file, ptx in zip(files, compiled, strict=True)}
    for (file, _, arch), kernels in zip(jobs, used, strict=True):
        for name, mangled in sorted(zip(demangled(list(kernels)), kernels, strict=True)):
            if kernels[mangled]["spilled"]:
                spilling.append(f"{file}: {name} sm_{arch}")
            for case in CASES:
                if case.file == file and re.fullmatch(case.kernel, name):
                    ptx = by_file[file][mangled]
                    threads = int(re.search(r"\.maxntid (\d+)", ptx)[1])
                    wide = round(wide_share(ptx, threads), 3)
                    row = f"{file}: {name}"
                    rows.setdefault(row, {})[str(arch)] = Figures(**kernels[mangled], wide=wide)
                    if case.wide != Case.wide:
                        floors[row] = case.wide
    return rows, floors, spilling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="files of csrc/cuda whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-budget", action="store_true", help=f"replace the part of {BUDGET.name}")
    options = parser.parse_args()
    if NVCC is None:
        parser.error("there is no nvcc on the PATH")
    rows, floors, spilling = report(options.arch, options.only)
    show(rows)
    print("spilling:", ", ".join(spilling) or "none")
    found = {"nvcc": version(), "wide": floors, "kernels": as_json(rows)}
    if options.json:
        write(found | {"spilling": spilling}, options.json)
    if options.write_budget:
        write_budget({"cuda": found})


if __name__ == "__main__":
    main()
