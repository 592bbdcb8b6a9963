"""The rules of the house: who may import whom, docstrings, length of files."""

import ast
import inspect
import pathlib
import re

import pytest
import torch

import normops
from normops import backends

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for folder in ("normops", "kernels") for path in (ROOT / folder).rglob("*.py"))
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inc", ".cpp", ".cu", ".cuh"))
# nn -> functional -> autograd -> ops -> backends -> kernels (lazily), reference; a module may import what stands after it
ORDER = ("nn", "functional", "autograd", "ops", "backends", "kernels", "cpu", "reference")


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so inside a function; also by importlib.import_module("...")."""
    tree = ast.parse(path.read_text())
    lazy = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(function)}
    package = path.parent.name if path.parent != ROOT / "kernels" else "normops.kernels"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            names = [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        found += [(name, id(node) in lazy) for name in names]
    return found


def test_files_are_found():
    assert {"normops/ops.py", "kernels/__init__.py"} <= {name_of(path) for path in FILES}
    assert ("normops.kernels.group_norm", True) in imports(ROOT / "normops" / "backends.py"), "the walk sees import_module"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    for name, lazy in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("tests", "bench"), f"{name}: nobody imports tests or bench"
        if package == "kernels":
            allowed = parts[0] in ("torch", "triton") or parts[:2] == ["normops", "kernels"] or parts[0] in __import__("sys").stdlib_module_names
            assert allowed, f"{name}: kernels import torch, triton, themselves"
            assert parts[:2] != ["normops", "kernels"] or path.name == "__init__.py" or "from ." in path.read_text(), f"{name}: by a relative import"
        if package == "normops" and parts[0] == "normops" and len(parts) > 1 and path.stem in ORDER:
            target = parts[1] if parts[1] in ORDER else None
            assert target is None or ORDER.index(target) > ORDER.index(path.stem), f"{path.stem} imports {name}: against the arrow"
            assert target != "kernels" or lazy, f"{name}: kernels are imported when they are asked for"
            assert target != "kernels" or path.stem == "backends", f"{name}: only backends knows the kernels"
        if package == "normops" and parts[0] == "triton":
            pytest.fail(f"{name}: only kernels import triton")


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith("kernels")], ids=name_of)
def test_kernels_do_not_name_normops_modules(path):
    """Not by string either: getattr, import_module, sys.modules."""
    code = ast.parse(path.read_text())
    strings = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    documentation = {ast.get_docstring(node, clean=False) for node in ast.walk(code)
                     if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    for value in strings:
        assert value in documentation or not value.startswith("normops"), value


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_csrc_stands_alone(path):
    text = re.sub(r"//.*", "", path.read_text())  # a comment may say where the other half of a contract stands
    for include in re.findall(r'#include\s+"([^"]+)"', text):
        assert (path.parent / include).resolve().is_relative_to(ROOT / "csrc"), include
    for folder in ("kernels/", "bench/", "tests/", "normops/", "reference.py"):
        assert folder not in text, f"csrc mentions {folder}"
    if "cuda" in path.parts:
        assert "../cpu" not in text
    if "cpu" in path.parts:
        assert "../cuda" not in text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_have_one_job(path):
    text = path.read_text()
    assert text.count("\n") <= 400, "when a file passes 400 lines, look for the second job in it"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "the module docstring says what the file is for"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith("normops")], ids=name_of)
def test_public_functions_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if path.stem in ("cpu", "reference") and node.name in backends.OPS:
            continue  # the pair that every backend offers: backends.py describes it
        assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_public_names():
    for name in normops.__all__:
        value = getattr(normops, name)
        assert value.__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", normops.__version__)


def test_documented_signature():
    """The public function documents every argument, what it raises, torch's equivalent and its source."""
    text = inspect.getdoc(normops.group_norm)
    for name in inspect.signature(normops.group_norm).parameters:
        assert re.search(rf"\b{name}\b", text), f"{name} is not documented"
    for word in ("Same as ``torch.nn.functional.group_norm", "Raises", "arXiv", "variance"):
        assert word in text


def test_op_and_function_have_one_signature():
    """What the schema, the public function and the differentiable op call their arguments, and the defaults."""
    schema = torch.ops.normops.group_norm.default._schema
    ops = [(argument.name, argument.default_value if argument.has_default_value() else inspect.Parameter.empty) for argument in schema.arguments]
    for function in (normops.group_norm, normops.autograd.group_norm):
        parameters = inspect.signature(function).parameters.values()
        assert [name for name, _ in ops][1:] == [parameter.name for parameter in parameters][1:]
        assert [default for _, default in ops] == [parameter.default for parameter in parameters]


def test_every_backend_has_the_reference_signature():
    from normops import reference

    tree = ast.parse((ROOT / "kernels" / "group_norm.py").read_text())
    for op in backends.OPS:
        names = list(inspect.signature(getattr(reference, op)).parameters)
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == op)
        assert [argument.arg for argument in function.args.args] == names
