"""Builds ``csrc/cuda`` without a GPU: by nvcc to machine code, and by g++ to operators on CPU tensors."""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STANDARD = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
TORCH = Path(torch.__file__).parent
INCLUDES = [f"-I{path}" for path in (TORCH / "include", sysconfig.get_path("include"))]
ARCHITECTURES = ("80", "90", "100")


def run(command: list, **options) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


def machine_code(name: str, folder: Path) -> str:
    """What ptxas says of the kernels of one file for every architecture, all from the PTX of the oldest one, to be quick; they go to `folder`."""
    code = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    flags = ["-O3", *STANDARD, f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{code}]", "-Xptxas=-v", "--threads=2"]
    return run(["nvcc", *flags, *INCLUDES, "-fatbin", ROOT / f"csrc/cuda/{name}.cu", "-o", folder / f"{name}.fatbin"])


def build(variant: str, folder: Path, sources: tuple[str, ...], replacements: dict[str, str]):
    """``torch.ops`` namespace of CUDA sources on CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no g++ on Linux, which has what the emulation is made of")
    namespace, replaced = f"normops_emulated_{variant}", set()
    shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
    for path in (folder / "cuda").iterdir():
        text = path.read_text()
        for old, new in {"normops_CUDA, CUDA": "normops_CUDA, CPU", "normops_CUDA": namespace, **replacements}.items():
            replaced |= {old} if old in text else set()
            text = text.replace(old, new)
        path.write_text(text)
    assert replaced >= set(replacements)
    (folder / "cuda_runtime.h").write_text('#include "cuda_emulation.h"\n')
    library = folder / "emulated.so"
    flags = "-O1 -march=native -fPIC -fvisibility=hidden -fno-gnu-unique -U_FORTIFY_SOURCE -Wall -Werror -Wno-unknown-pragmas".split()
    includes = [f"-I{folder}", f"-I{ROOT / 'tests'}", *INCLUDES]
    objects = [folder / f"{name}.o" for name in sources]
    commands = [[compiler, *flags, *STANDARD, *includes, "-c", "-x", "c++", folder / f"cuda/{made.stem}.cu", "-o", made] for made in objects]
    list(ThreadPoolExecutor().map(run, commands))
    run([compiler, "-shared", "-Wl,-Bsymbolic", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", library])
    torch.ops.load_library(str(library))
    return getattr(torch.ops, namespace)
