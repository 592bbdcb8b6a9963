"""Compile the Triton kernels that a call would launch, for any architecture, without a GPU, and read what the compiler made."""

import collections
import contextlib
import functools
import math
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import normops.kernels
import torch
import triton
from normops.kernels import activation_moments, analytic_norm_weight, batch_norm, group_norm, row_norm
from normops.kernels.config import Device
from normops.kernels.exchange import SPACING
from normops.kernels.launch import COOPERATIVE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import gate
from bench.methods import DIRECTIONS
from bench.norms import inputs, ours
from bench.shapes import Case
from normops import autograd, backends

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32"}


def meta(*size, dtype):
    return torch.empty(size, dtype=dtype, device="meta")


class Launch(NamedTuple):
    """What `launch` in kernels/launch.py was called with."""

    kernel: Any
    programs: int
    num_warps: int
    args: tuple
    cooperative: bool = False

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip((parameter.name for parameter in self.kernel.params), self.args, strict=True))


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted and do not take place; tensors are on the meta device."""
    recorded: list[Launch] = []

    def note(kernel, programs, num_warps, *args, cooperative=False):
        recorded.append(Launch(kernel, programs, num_warps, args, cooperative))

    def counters(x, teams):
        return meta(teams * SPACING.value, dtype=torch.int32)

    real, real_counters = group_norm.launch, group_norm.counters
    launching = [module for name, module in sys.modules.items() if name.startswith("normops.kernels.") and getattr(module, "launch", None) is real]
    for module in launching:
        module.launch = note
        if hasattr(module, "counters"):
            module.counters = counters
    try:
        yield recorded
    finally:
        for module in launching:
            module.launch = real
            if hasattr(module, "counters"):
                module.counters = real_counters


def group_launches(config, N, C, S, G, dtype, channels_last, backward, activation=3, residual=False, rows=1, frozen=False):
    """Every launch of one group norm."""
    x = meta(N, C, S, dtype=dtype)
    r = x if residual else None
    weight, bias = (meta(rows, C, dtype=dtype) for _ in range(2))
    stats = meta(3, 1 if frozen else N, G, dtype=torch.promote_types(dtype, torch.float32))
    with recording() as recorded:
        if backward:
            group_norm.backward(config, x, weight, bias, r, x, x, stats, weight, bias, r, None, N, C, G, channels_last, frozen, activation, 0.1)
        else:
            group_norm.forward(config, x, stats, x, weight, bias, r, N, C, G, channels_last, frozen, 1e-5, activation, 0.1)
    return recorded


def batch_launches(config, N, C, S, dtype, channels_last, backward, activation=1, residual=False):
    """Every launch of one batch norm."""
    x = meta(N, C, S, dtype=dtype)
    r = x if residual else None
    weight, bias, mean, var = (meta(C, dtype=torch.float32) for _ in range(4))
    stats = meta(4, 1, C, dtype=torch.promote_types(dtype, torch.float32))
    with recording() as recorded:
        if backward:
            batch_norm.backward(config, x, weight, bias, r, x, x, stats, weight, bias, r, N, C, channels_last, activation, 0.1)
        else:
            batch_norm.forward(config, x, stats, mean, var, x, weight, bias, r, N, C, channels_last, 0.1, 1e-5, activation, 0.1)
    return recorded


def row_launches(config, N, C, S, G, dtype, centered, backward, activation=0, addend=False, rows=1):
    """Every launch of one row norm; rows = 0: there is no weight."""
    x = meta(N, C, S, dtype=dtype)
    added = x if addend else None
    weight, bias = meta(rows, C, dtype=dtype) if rows else None, meta(rows, C, dtype=dtype) if rows and centered else None
    stats = meta(3 if centered else 1, N, G, S, dtype=torch.promote_types(dtype, torch.float32))
    with recording() as recorded:
        if backward:
            row_norm.backward(config, x, weight, bias, None, x, added, x, stats, weight, bias, None, N, C, G, centered, 0.0, activation, 0.1)
        else:
            row_norm.forward(config, x, added, stats, x, added, weight, bias, None, N, C, G, centered, 0.0, 1e-5, activation, 0.1)
    return recorded


def moments_launches(function):
    """The launch of one map."""
    mean = meta(1000, dtype=torch.float64)
    with recording() as recorded:
        activation_moments.forward(None, meta(6, 1000, dtype=torch.float64), mean, mean, function, 0.5, 0.7)
    return recorded


def weight_launches(config, outputs, inputs, taps, groups, dtype, channels_last, backward):
    """Every launch of one analytic norm."""
    weight, scale = meta(outputs, inputs, taps, dtype=dtype), meta(outputs, dtype=dtype)
    mean, row, stats = (meta(*size, dtype=torch.float64) for size in ((groups * inputs,), (outputs,), (2, outputs)))
    sizes = (outputs, taps, groups, channels_last, 1e-10)
    with recording() as recorded:
        if backward:
            analytic_norm_weight.backward(config, weight, mean, mean, row, weight, row, stats, weight, mean, mean, scale, stats, *sizes)
        else:
            analytic_norm_weight.forward(config, weight, scale, stats, weight, mean, mean, scale, scale, *sizes)
    return recorded


# ---- what a call launches ----


@dataclass
class Op:
    """A torch op that runs a kernel."""

    name: str
    read: list[Tensor]
    written: list[Tensor]


@dataclass
class Call:
    case: Case
    direction: str
    steps: list
    regime: str


class Noting(TorchDispatchMode):
    """Notes the torch ops that neither make views nor only allocate."""

    def __init__(self, steps: list):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, of_result = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result))
        views = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)
        if of_result and not views and "empty" not in func.__name__ and func.namespace == "aten":
            self.steps.append(Op(func.__name__, given, of_result))
        return result


@contextlib.contextmanager
def on_meta(device: Device) -> Iterator[tuple[list, list]]:
    """Calls on meta tensors go the way of CUDA tensors on `device`, as far as the launches: what they launch, and the configurations."""
    configs: list = []

    def noting(choose: Callable) -> Callable:
        def call(*args, **options):
            configs.append(choose(*args, **options))
            return configs[-1]

        return call

    with contextlib.ExitStack() as stack, recording() as steps:
        for name in ("group_norm", "batch_norm", "row_norm", "activation_moments", "analytic_norm_weight", "launch"):
            module = getattr(normops.kernels, name)
            changes = {"INTERPRET": True, "device_of": lambda index: device}
            changes |= {key: noting(value) for key, value in vars(module).items() if key.startswith("choose")}
            for key in changes.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, key, changes[key]))
        stack.enter_context(mock.patch.dict(backends.ORDER, meta=("triton",)))
        stack.enter_context(mock.patch.object(normops.kernels, "unavailable", lambda: None))
        stack.enter_context(mock.patch.object(autograd, "_dispatch_modes", lambda: 0))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None)))
        stack.callback(backends._candidates.cache_clear)
        yield steps, configs


def record(case: Case, direction: str, device: Device) -> Call:
    """The launches of the second call, that of a running model."""
    with on_meta(device) as (steps, configs):
        leaves = {name: value.requires_grad_() for name, value in inputs(case, "meta").items()}
        dy = gate.upstream(case, leaves)
        grad, make = DIRECTIONS[direction]
        with torch.set_grad_enabled(grad):
            run = make(ours(case), list(leaves.values()), dy)
            run()
            steps.clear()
            configs.clear()
            with Noting(steps):
                run()
    return Call(case, direction, list(steps), "+".join(dict.fromkeys(config.regime for config in configs)))


# ---- what the compiler makes of it ----


def source(launch):
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, arg) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        if parameter.is_constexpr or arg is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = arg
        elif isinstance(arg, torch.Tensor):
            signature[parameter.name] = TYPES[arg.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(arg, int) and arg == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = arg
        else:
            signature[parameter.name] = parameter.annotation_type or ("i64" if arg >= 1 << 31 else "i32")
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_variant(launch, capability):
    options = {"num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True} | (COOPERATIVE if launch.cooperative else {})
    return triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=options)


@functools.lru_cache(maxsize=4)
def tool(name, *arguments, cubin):
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def resources(compiled):
    """Registers, stack and local bytes of a thread, shared bytes of a program."""
    usage = tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return found | {"shared": compiled.metadata.shared}


CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$", re.M)


def executed(compiled, once=False):
    """SASS opcodes of the usual way through a program: forward conditional branches taken (they lead around an overflow's second
    sum or a slow path) unless they lead around a loop, loops run once, and what lies behind the last EXIT left out.
    once: of the longest outermost loop alone, if there is one."""
    found, inside = _path(compiled)
    return max(inside, key=len) if once and inside else found


def loops(compiled):
    """Opcodes of the outermost loops on that way, in order, of each once."""
    return _path(compiled)[1]


def _path(compiled):
    text = tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])
    label_at = {match[1]: match.start() for match in re.finditer(r"^(\.L_\w+):", text, re.M)}

    def target(match):
        found = re.search(r"`\((\.L_\w+)\)", match[3]) if match[2] == "BRA" else None
        return label_at[found[1]] if found else None

    back = [(target(match), match.start()) for match in CODE.finditer(text) if 0 < (target(match) or 0) < match.start()]
    position, places, opcodes = 0, [], []
    while match := CODE.search(text, position):
        places.append(match.start())
        opcodes.append(match[2])
        if match[2] == "EXIT" and not match[1]:
            break
        position, ahead = match.end(), target(match)
        if ahead and ahead > position and match[1] and not any(position < first and last < ahead for first, last in back):
            position = ahead
    outermost = [loop for loop in sorted(set(back)) if not any(other[0] <= loop[0] and loop[1] <= other[1] for other in back if other != loop)]
    inside = [[opcode for place, opcode in zip(places, opcodes, strict=True) if first <= place <= last] for first, last in outermost]
    return opcodes, [found for found in inside if found]


def global_accesses(opcodes):
    """How many of each (ld or st, bits). From SASS: in the PTX of Triton 3.6 a value that many registers share is loaded many times."""
    bits = {"64": 64, "128": 128, "256": 256, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
    accesses = [opcode.split(".") for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
    return collections.Counter((name[:2].lower(), next((bits[part] for part in parts if part in bits), 32)) for name, *parts in accesses)


# ---- what a program does, from Triton's own code ----


class Access(NamedTuple):
    """A load or a store of an argument."""

    name: str
    store: bool
    lanes: int  # of the tile, those that are masked out among them
    passing: bool  # the cache is asked to let go of it first
    times: float  # how often a program does it
    loop: int  # the innermost loop around it; 0: none


class Program(NamedTuple):
    accesses: list[Access]
    trips: list[float]  # of the outermost loops; 0 where they are not met
    meetings: int  # of all programs of the launch


ARITHMETIC = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "minsi": min, "maxsi": max,
    "divsi": lambda x, y: int(x / y) if y else 0, "remsi": lambda x, y: math.fmod(x, y) if y else 0,
    "extsi": int, "extui": int, "trunci": int, "select": lambda condition, x, y: x if condition else y,
}  # fmt: skip
COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge}


def program(launch: Launch, ttir: str, pid: int = 0) -> Program:
    """The accesses of program `pid`, by following in `ttir` which argument a pointer comes from, and by computing how often loops run.
    What depends on values in memory (an overflow's second sum) does not happen."""
    parameters = re.findall(r"%(\w+): [!\w]", next(line for line in ttir.splitlines() if "tt.func public" in line))
    given = [name for name, type in source(launch).signature.items() if type != "constexpr"]
    values: dict[str, Any] = {}  # of integers; of pointers the name of what they point to
    for parameter, name in zip(parameters, given, strict=True):
        arg = launch.named[name]
        values[parameter] = name if isinstance(arg, torch.Tensor) else arg
    found, outermost, meetings, loops = [], [], 0, 0
    regions: list[tuple[int, int]] = []  # how often each runs, and the loop it belongs to
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*\)$", "", line).strip()
        if text.startswith("}"):
            ended = regions.pop()
        times, loop = regions[-1] if regions else (1, 0)
        match = re.match(r"(?:%(\w+)(?::\d+)? = )?\"?([a-z]\w*)\.(\w+)", text)
        result, dialect, op = match.groups() if match else (None, "", "")
        used = re.findall(r"%(\w+)", text[match.end() :].split(" : ")[0]) if match else []
        known = [values.get(name) for name in used]
        inner = times, loop
        if op == "for":
            loops += 1
            first, last, step = known[1:4]
            trips = max(0, math.ceil((last - first) / step)) if all(isinstance(value, int) for value in (first, last, step)) else 1
            if loop == 0:
                outermost.append(times * trips)
            values[used[0]] = first
            values |= {name: values[initial] for name, initial in zip(used[4::2], used[5::2], strict=False) if initial in values}
            inner = times * trips, loops
        elif op == "while":
            loops += 1
            meetings += times
            if loop == 0:
                outermost.append(times)
            inner = times, loops
        elif op == "if":
            inner = times if known[0] else 0, loop
        elif text == "} else {":
            inner = 0 if ended[0] else times, loop
        elif op in ("load", "store") and dialect == "tt":
            shape = re.search(r"tensor<([\dx]+)x!tt.ptr", text)
            lanes = math.prod(map(int, shape[1].split("x"))) if shape else 1
            found.append(Access(known[0], op == "store", lanes, "evict_first" in text, times, loop))
        elif op == "constant" and (integer := re.match(r".* = arith.constant (-?\d+) :", text)):
            values[result] = int(integer[1])
        elif op in ("get_program_id", "get_num_programs"):
            values[result] = pid if op == "get_program_id" else launch.programs
        elif op == "cmpi" and all(isinstance(value, int) for value in known):
            predicate = COMPARISONS.get(text[match.end() :].split()[0].rstrip(","))
            values[result] = predicate and int(predicate(*known))
        elif dialect == "arith" and op in ARITHMETIC and all(isinstance(value, int) for value in known):
            values[result] = int(ARITHMETIC[op](*known))
        elif result and "!tt.ptr" in text:
            values[result] = next((name for name in known if isinstance(name, str)), None)
        if text.endswith("{"):
            regions.append(inner)
    return Program(found, outermost, meetings)
