"""The wheel: what is in it, and that it is made where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("normops", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 70.1, which can build wheels itself")


def python(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run python with its folder first on the path, so that no installed normops comes before."""
    clean = {name: value for name, value in os.environ.items() if name not in ("NORMOPS_BUILD", "NORMOPS_BACKEND")}
    path = os.pathsep.join([str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *args], cwd=cwd, env=clean | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=300)


def build(checkout: Path, **env: str) -> subprocess.CompletedProcess:
    """A wheel in the folder dist of a copy of the checkout, by a compiler that only fails. pip would call the same command of setup.py."""
    if not checkout.exists():
        checkout.mkdir()
        for source in filter(Path.exists, map(ROOT.joinpath, SOURCES)):
            if source.is_dir():
                shutil.copytree(source, checkout / source.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(source, checkout)
    return python("setup.py", "bdist_wheel", cwd=checkout, CXX="/bin/false", CC="/bin/false", **env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("packaging") / "checkout"
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("normops: normops._C is not built: ") == 1, result.stderr
    (path,) = (checkout / "dist").iterdir()
    return path


def test_wheel_without_compiler_is_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"normops/{path.relative_to(ROOT / 'normops')}" for path in (ROOT / "normops").rglob("*.py")}
    modules |= {f"normops/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules | {"normops/py.typed"}


def test_wheel_requires_torch_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    required = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert required == ["torch>=2.11"]


def test_wheel_computes(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import torch, normops
x = torch.randn(2, 8, 5)
with normops.backend("reference"):
    torch.testing.assert_close(normops.group_norm(x, 4, activation="silu"), torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)))
import normops.kernels
print(normops.__file__, normops.kernels.__file__)
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "normops" / "__init__.py"), str(tmp_path / "normops" / "kernels" / "__init__.py")]


def test_failure_is_fatal_on_request(wheel):
    result = build(wheel.parent.parent, NORMOPS_BUILD="1")
    assert result.returncode != 0
    assert "NORMOPS_BUILD=1 makes this an error" in result.stderr


def test_versions_and_backends_are_printed():
    result = python("-m", "normops", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for word in ("normops", "torch", "triton", "group_norm_fwd", "batch_norm_bwd", "reference", "cpu", "cuda"):
        assert word in result.stdout
