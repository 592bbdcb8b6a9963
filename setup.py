"""Builds the optional extensions ``normops._C`` (csrc/cpu) and ``normops._CUDA`` (csrc/cuda); everything else is in pyproject.toml.

What cannot be built is left out with one sentence, and the package works without it. ``NORMOPS_BUILD=1`` makes that an error.
torch is no build requirement: pip would fetch gigabytes, and maybe another CUDA than the one installed. Hence ``--no-build-isolation``.
"""

import os
import pathlib
import shutil
import subprocess
import sysconfig
import warnings

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = pathlib.Path(__file__).parent
ARCHITECTURES = ("8.0", "9.0", "10.0")  # what is built when no GPU is there to ask
ABI_FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]  # torch 2.11, Python 3.10
CXX_FLAGS = ["-O3", "-g0", "-Wno-psabi", "-Wno-maybe-uninitialized", *ABI_FLAGS]  # the last warning: false alarms from gcc 12's AVX-512 header
NVCC_FLAGS = ["-O3", "-DUSE_CUDA", "--threads=4", "-Xfatbin=-compress-all", *ABI_FLAGS]
# torch switches the operators of half and bfloat16 off for nvcc: on again
NVCC_FLAGS += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")]


def cuda_home() -> str | None:
    """The CUDA toolkit. (torch takes the folder above ``which nvcc``, which may be a link or a script.)"""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))]
    homes += ["/usr/local/cuda", *sorted(map(str, pathlib.Path("/usr/local").glob("cuda-*")), reverse=True)]
    whole = (home for home in homes if home and os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime.h"))
    return next(whole, None)


HOME = cuda_home()
if HOME is not None:
    os.environ["CUDA_HOME"] = HOME  # torch.utils.cpp_extension reads it when it is imported
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except (ImportError, OSError) as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    torch = None
    NO_TORCH = f"torch cannot be imported in this build environment ({error}), use `pip install --no-build-isolation` where torch is installed"


def architectures() -> str:
    """Those of ARCHITECTURES that this nvcc knows, the last one also as PTX for the GPUs to come."""
    known = subprocess.run([f"{HOME}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known) + "+PTX"


def extensions() -> list[Extension]:
    cpu, cuda = (sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)) for pattern in ("csrc/cpu/*.cpp", "csrc/cuda/*.cu"))
    if torch is None:
        return [Extension("normops._C", cpu, py_limited_api=True)] if cpu else []  # Build leaves it out and says why
    found = []
    if cpu:
        found.append(CppExtension("normops._C", cpu, include_dirs=["csrc"], extra_compile_args={"cxx": CXX_FLAGS}, py_limited_api=True))
    if cuda and torch.version.cuda:
        flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
        found.append(CUDAExtension("normops._CUDA", cuda, include_dirs=["csrc"], extra_compile_args=flags, py_limited_api=True))
    return found


class Build(BuildExtension):
    """Leaves out the extensions that cannot be built, so that no later step expects their files."""

    def leave_out(self, extensions: list[Extension], reason: object) -> None:
        for extension in extensions:
            sentence = f"normops: {extension.name} is not built: {' '.join(str(reason).split())}"
            if os.environ.get("NORMOPS_BUILD") == "1":
                raise SystemExit(f"{sentence} (NORMOPS_BUILD=1 makes this an error)")
            warnings.warn(f"{sentence} (the package works without it)", stacklevel=2)  # pip 26 shows warnings, but no output, of a build
            for folder in self.folders:  # what an earlier build left there
                pathlib.Path(folder, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.extensions[:] = [extension for extension in self.extensions if extension not in extensions]

    def run(self) -> None:
        self.folders = [self.build_lib, *(["."] if self.inplace else [])]
        compiler = os.environ.get("CXX", "c++")
        if torch is None:
            self.leave_out(self.extensions, NO_TORCH)
        elif shutil.which(compiler.split()[0]) is None:
            self.leave_out(self.extensions, f"no C++ compiler is here, looked for `{compiler}` (set CXX)")
        elif HOME is None:
            reason = f"torch {torch.__version__} is for CUDA {torch.version.cuda}, but no nvcc is on the PATH or in CUDA_HOME"
            self.leave_out([extension for extension in self.extensions if extension.name == "normops._CUDA"], reason)
        elif torch.version.cuda and not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        compiler, inplace = self.compiler, self.inplace
        while self.extensions:
            self.compiler, self.inplace = compiler, inplace
            try:
                return super().run()
            except Exception as error:  # before anything was compiled: try again without CUDA, then give up
                self.leave_out(self.extensions[-1:], error)

    def build_extensions(self) -> None:
        self.failed: list[tuple[Extension, Exception]] = []
        super().build_extensions()
        for extension, error in self.failed:
            self.leave_out([extension], error)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.failed.append((ext, error))


class Wheel(bdist_wheel):
    """Names the wheel by what was built, not by what was tried: without extensions it is ``py3-none-any``."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a Python without the GIL has no stable ABI
setup(
    license="MIT",
    packages=[*find_packages(include=["normops", "normops.*"]), "normops.kernels", *("normops.kernels." + name for name in find_packages("kernels"))],
    package_dir={"normops.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {},
)
