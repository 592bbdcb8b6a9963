"""The rules of the house: who may import whom, docstrings, length of files."""

import ast
import importlib
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
# a module may import what stands after it; kernels lazily
ORDER = (
    "nn", "analytic", "functional", "statistics", "operators", "autograd", "families", "ops", "launch", "distributed", "layout", "checks", "backends",
    "kernels", "cpu", "reference", "weights", "maps", "activations",
)  # fmt: skip
PARTS = [importlib.import_module(f"normops.functional.{path.stem}") for path in FILES if path.parent.name == "functional" and path.stem[0] != "_"]
FUNCTIONS = {name: value for name, value in vars(normops.functional).items() if inspect.isfunction(value) and name in normops.__all__}


def module_of(path: pathlib.Path) -> str:
    """What ORDER calls a file of normops: a package is one module."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so inside a function; also by importlib.import_module("...")."""
    tree = ast.parse(path.read_text())
    lazy = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(function)}
    package = ".".join(path.parent.relative_to(ROOT).parts) if path.parent != ROOT / "kernels" else "normops.kernels"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            first = node.args[0].values[0] if node.args and isinstance(node.args[0], ast.JoinedStr) else node.args[0]  # an f-string's beginning
            names = [first.value] if isinstance(first, ast.Constant) else []
        else:
            continue
        found += [(name, id(node) in lazy) for name in names]
    return found


def test_files_are_found():
    assert {"normops/ops.py", "kernels/__init__.py"} <= {name_of(path) for path in FILES}
    assert ("normops.kernels.", True) in imports(ROOT / "normops" / "backends.py"), "the walk sees import_module"
    modules = {module_of(path) if name_of(path).startswith("normops") else "kernels" for path in FILES}
    assert set(ORDER) == modules - {"__init__", "__main__"}, "every module has its place"


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
        if package == "normops" and parts[0] == "normops" and len(parts) > 1 and module_of(path) in ORDER:
            own, target = module_of(path), parts[1] if parts[1] in ORDER else None
            assert target in (None, own) or ORDER.index(target) > ORDER.index(own), f"{own} imports {name}: against the arrow"
            assert target != "kernels" or lazy, f"{name}: kernels are imported when they are asked for"
            assert target != "kernels" or own == "backends", f"{name}: only backends knows the kernels"
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
        if path.stem in ("cpu", "reference", "maps", "weights") and node.name in backends.OPS:
            continue  # the pair that every backend offers: backends.py describes it
        assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_public_names():
    for name in normops.__all__:
        value = getattr(normops, name)
        assert value.__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", normops.__version__)
    public = {name for part in PARTS for name, value in vars(part).items()
              if inspect.isfunction(value) and value.__module__ == part.__name__ and not name.startswith("_")}  # fmt: skip
    assert public == FUNCTIONS.keys() == set(normops.functional.__all__), "what normops.functional defines is what the package offers"
    classes = {name for part in ("norms", "batch") for name, value in vars(getattr(normops.nn, part)).items()
               if inspect.isclass(value) and value.__module__ == f"normops.nn.{part}" and not name.startswith("_")}  # fmt: skip
    assert classes - {"Fused", "BatchRenorm", "BatchInstanceNorm"} <= set(normops.nn.__all__), "modules, but not what they are made of"


def documentation(name: str) -> str:
    """The docstring of a function, of the public functions that it refers to, and of their module."""
    found, wanted = {}, [name]
    while wanted:
        function = wanted.pop()
        found[function] = inspect.getdoc(FUNCTIONS[function])
        wanted += [other for other in re.findall(r"`(\w+)", found[function]) if other in FUNCTIONS and other not in found]
    return "\n".join((*found.values(), inspect.getdoc(normops.functional)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented_signature(name):
    """Every argument, what it raises, torch's equivalent or the formula, the units of eps and the source."""
    own, text = inspect.getdoc(FUNCTIONS[name]), documentation(name)
    for argument in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"\b{argument}\b", text), f"{argument} is not documented"
    assert re.search(r"Same as|No torch function|(see|is) `\w+`", own), "what torch computes it by"
    for pattern in ("Same as ``|No torch function", "[Rr]aise", "arXiv|Source: ", "variance"):
        assert re.search(pattern, text), pattern


FORMULAS = {"max_moments", "max_pool_moments", "argmax_probabilities", "softmax_mean"}  # a few torch functions, traced as they are


@pytest.mark.parametrize("name", FUNCTIONS.keys() - FORMULAS)
def test_op_and_function_have_one_signature(name):
    """What the schema and the public function call their arguments, and the defaults."""
    schema = getattr(torch.ops.normops, name).default._schema
    ops = [(argument.name, argument.default_value if argument.has_default_value() else inspect.Parameter.empty, argument.kwarg_only)
           for argument in schema.arguments]  # fmt: skip
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    assert (
        ops[1:]
        == [
            (parameter.name, [] if parameter.default == () else parameter.default, parameter.kind == parameter.KEYWORD_ONLY)
            for parameter in parameters
        ][1:]
    )
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
    assert written == [argument.name for argument in schema.arguments if argument.name.startswith("running")], "running statistics, nothing else"


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if hasattr(torch.nn.functional, name)])
def test_torch_signature_comes_first(name):
    """A call of torch.nn.functional's function is a call of ours: the same names and defaults in the same places."""
    theirs = inspect.signature(getattr(torch.nn.functional, name)).parameters.values()
    mine = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in mine[: len(theirs)]]
    assert all(p.kind == p.KEYWORD_ONLY for p in mine[len(theirs) :])


def cuda_schemas() -> dict[str, list[str]]:
    """The arguments of the operators that csrc/cuda defines."""
    text = re.sub(r'"\s*\n\s*"', "", "".join(path.read_text() for path in SOURCES if path.suffix == ".cu"))
    schemas = [torch._C.parse_schema(schema) for schema in re.findall(r'"(\w+\([^"]*\) -> [^"]*)"', text)]
    return {schema.name: [argument.name for argument in schema.arguments] for schema in schemas}


@pytest.mark.parametrize("op", backends.OPS)
def test_every_backend_has_the_reference_signature(op):
    from normops import cpu, reference

    names = list(inspect.signature(getattr(reference, op)).parameters)
    tree = ast.parse((ROOT / "kernels" / f"{op[:-4]}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == op)
    assert [argument.arg for argument in function.args.args] == names
    assert list(inspect.signature(getattr(cpu, op)).parameters) == names
    assert cuda_schemas()[op] == names
