"""The CUDA backend without a GPU: every kernel compiles with nvcc and stays in registers, and the same sources, compiled as C++, compute group norm.

``cuda_emulation.h`` says what the second part can see and what it cannot.
"""

import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import test_group_norm as bodies
import torch
from cases import CASES, Inputs, check

import normops
from normops import backends

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/cuda/group_norm.cu"
STANDARD = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
TORCH = Path(torch.__file__).parent
INCLUDES = [f"-I{path}" for path in (TORCH / "include", sysconfig.get_path("include"), ROOT / "csrc/cuda")]
ARCHITECTURES = ("80", "90", "100")
MAX_REGISTERS = 128  # two blocks of 256 threads for each SM


def run(command: list[str], **options) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="no Python headers")
def test_kernels_compile_for_every_architecture(tmp_path: Path) -> None:
    """No warnings, no spills, no local memory. (The host code is compiled with all warnings below.)

    All from the PTX of the oldest one, to be quick. On their own for sm_100, three kernels for double spill one register.
    """
    code = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    flags = ["-O3", *STANDARD, f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{code}]", "-Xptxas=-v", "--threads=2"]
    log = run(["nvcc", *flags, *INCLUDES, "-fatbin", SOURCE, "-o", tmp_path / "group_norm.fatbin"])
    assert "warning" not in log, log
    found = re.findall(r"entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers", log, re.S)
    kernels = {arch: {name for name, of, *_ in found if of == arch} for arch in ARCHITECTURES}
    assert len(kernels["80"]) > 100 and kernels["80"] == kernels["90"] == kernels["100"]
    assert not [entry for entry in found if int(entry[2]) or int(entry[3]) or int(entry[4]) > MAX_REGISTERS]


# the split kernels need large tensors; here they run on all sizes, with tiles of several steps
VARIANTS = {
    "as_built": {},
    "split": {"kGroupBytes = 32 << 10": "kGroupBytes = 0", "kBlocks = 2048": "kBlocks = 1", "kMaxSteps = 64": "kMaxSteps = 4"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """``torch.ops`` namespace of the CUDA sources on CPU tensors, and the function to put in place of ``backends.run``."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no g++ on Linux, which has what the emulation is made of")
    folder = tmp_path_factory.mktemp(request.param)
    namespace = f"normops_emulated_{request.param}"
    text = SOURCE.read_text()
    for old, new in {"normops_CUDA, CUDA": "normops_CUDA, CPU", "normops_CUDA": namespace, **VARIANTS[request.param]}.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "group_norm.cpp").write_text(text)
    (folder / "cuda_runtime.h").write_text('#include "cuda_emulation.h"\n')
    library = folder / "emulated.so"
    flags = "-O1 -march=native -fPIC -shared -fvisibility=hidden -fno-gnu-unique -U_FORTIFY_SOURCE -Wall -Werror -Wno-unknown-pragmas".split()
    links = ["-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    includes = [f"-I{folder}", f"-I{ROOT / 'tests'}", *INCLUDES]
    run([compiler, *flags, *STANDARD, *includes, folder / "group_norm.cpp", *links, "-o", library])
    torch.ops.load_library(str(library))
    return getattr(torch.ops, namespace)


@pytest.fixture
def emulation(emulated, monkeypatch: pytest.MonkeyPatch, poison):
    """normops runs on the emulated kernels, and on nothing else."""
    launched = []

    def launch(op: str, x: torch.Tensor, *args) -> None:
        launched.append(op)
        with torch._C._AutoDispatchBelowAutograd():
            getattr(emulated, op)(*args)

    monkeypatch.setattr(backends, "everyday", False)
    monkeypatch.setattr(backends, "run", launch)
    yield
    assert launched, "the test has not reached the emulated kernels"


@pytest.mark.parametrize("name", CASES)
def test_emulated_cases(emulation, name: str) -> None:
    inputs = Inputs.of(CASES[name], "cpu")
    check(inputs.run(normops.group_norm), inputs)


# bodies of test_group_norm.py, on what is most at risk in these kernels, and one value of each parameter
PROPERTIES = {
    "far_from_zero": {"shape": (2, 33, 16, 16), "ratio": 1e4},
    "constant_input_gives_bias": {"shape": (2, 6, 37, 40), "dtype": torch.float32},
    "huge_and_tiny": {"magnitude": 1e30, "shape": (1, 4, 70, 70)},
    "one_outlier": {"shape": (1, 8, 40, 41), "where": 0},
    "statistics": {"dtype": torch.float64},
    "nothing_is_written_outside": {"residual": True},
    "backward_mask": {},
    "each_gradient_alone": {"name": "everything"},
    "same_result_without_gradients": {"case": CASES["cl_C33"]},
}


@pytest.mark.parametrize("layout", bodies.LAYOUT_IDS)
@pytest.mark.parametrize("name", PROPERTIES)
def test_emulated_properties(emulation, poison, monkeypatch: pytest.MonkeyPatch, name: str, layout: str) -> None:
    body = getattr(bodies, f"test_{name}")
    fixtures = {"backend": "cuda", "device": "cpu", "poison": poison, "monkeypatch": monkeypatch, "layout": layout}
    body(**PROPERTIES[name], **{key: value for key, value in fixtures.items() if key in inspect.signature(body).parameters})
