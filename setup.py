"""pip calls CMake: one extension without sources, whose build is `CMakeLists.txt`.

DDPM_FAST_NATIVE=auto (default) builds the compiled library, or says loudly that there is no compiler and
installs without it; =require fails instead; =skip does not try. DDPM_FAST_CUDA=auto (default) builds the CUDA
kernels too where there are nvcc and a torch of the same CUDA; =require and =skip are the same.
"""

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def wish(name):
    value = os.environ.get(name, "auto")
    if value not in ("auto", "require", "skip"):
        sys.exit(f"{name}={value!r} is not known; allowed: auto, require, skip")
    return value


NATIVE, CUDA = wish("DDPM_FAST_NATIVE"), wish("DDPM_FAST_CUDA")
CMAKE_CUDA = {"auto": "AUTO", "require": "ON", "skip": "OFF"}[CUDA]
if NATIVE == "skip" and CUDA == "require":
    sys.exit("DDPM_FAST_CUDA=require, but DDPM_FAST_NATIVE=skip builds nothing")


def torch_root():
    """The torch that is installed, seen from inside pip's isolated build too, or None."""
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


class CMakeBuild(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".abi3.so"  # one name on every Python: the stable ABI

    def run(self):
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath("ddpm_fast._C")).resolve().parent
        for name in ("_C", "_C_cuda"):  # of an earlier build, perhaps with other wishes
            (target / f"{name}.abi3.so").unlink(missing_ok=True)
        configure = [
            "cmake",
            "--fresh",
            "-S",
            ".",
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DTORCH_ROOT={torch_root()}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DDDPM_FAST_CUDA={CMAKE_CUDA}",
        ]
        try:
            subprocess.run([*configure, f"-DCMAKE_INSTALL_PREFIX={target}"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if "require" in (NATIVE, CUDA):
                raise
            self.extensions.clear()
            rule = "*" * 100
            print(
                f"\n{rule}\nddpm_fast: NOT BUILDING the compiled library: CMake found no C++ compiler "
                f"or no torch >= 2.11 ({error}).\nEverything works in plain PyTorch, several times slower. "
                "Install g++ or clang++ and reinstall;\nDDPM_FAST_NATIVE=require makes this an error."
                f"\n{rule}\n",
                file=sys.stderr,
            )
            return
        subprocess.run(["cmake", "--build", build, "--target", "install"], check=True)


setup(
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    ext_modules=[] if NATIVE == "skip" else [Extension("ddpm_fast._C", sources=[], py_limited_api=True)],
    setup_requires=[] if NATIVE == "skip" or torch_root() else ["torch>=2.11"],
)
