"""Compile the Triton kernels that a call would launch, for any architecture, without a GPU, and read what the compiler made."""

import collections
import contextlib
import os
import re
import subprocess
import tempfile

import torch
import triton
from normops.kernels import activation_moments, analytic_norm_weight, batch_norm, fold, group_norm, row_norm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


def meta(*size, dtype):
    return torch.empty(size, dtype=dtype, device="meta")


@contextlib.contextmanager
def recording():
    """Launches are noted, (kernel, num_warps, args), and do not take place; tensors are on the meta device."""
    recorded = []
    modules = (group_norm, batch_norm, row_norm, fold, activation_moments, analytic_norm_weight)
    real = group_norm.launch
    for module in modules:
        module.launch = lambda kernel, programs, num_warps, *args: recorded.append((kernel, num_warps, args))
    try:
        yield recorded
    finally:
        for module in modules:
            module.launch = real


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


def source(kernel, args):
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, arg) in enumerate(zip(kernel.params, args, strict=True)):
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
    return ASTSource(kernel, signature, constants, attributes)


def compile_variant(kernel, num_warps, args, capability):
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source(kernel, args), target=GPUTarget("cuda", capability, 32), options=options)


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


def executed(compiled, once=False):
    """SASS opcodes of the usual way through a program: forward conditional branches taken (they lead around an overflow's second
    sum or a slow path) unless they lead around a loop, loops run once, and what lies behind the last EXIT left out.
    once: of the outermost loop alone, if there is one."""
    text = tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])
    label_at = {match[1]: match.start() for match in re.finditer(r"^(\.L_\w+):", text, re.M)}
    code = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$", re.M)

    def target(match):
        found = re.search(r"`\((\.L_\w+)\)", match[3]) if match[2] == "BRA" else None
        return label_at[found[1]] if found else None

    found, position, end = [], 0, len(text)
    if once:
        back = [(target(match), match.start()) for match in code.finditer(text) if 0 < (target(match) or 0) < match.start()]
        position, end = max(back, key=lambda loop: loop[1] - loop[0], default=(0, end))
    while (match := code.search(text, position)) and match.start() < end:
        found.append(match[2])
        if match[2] == "EXIT" and not match[1]:
            break
        position, ahead = match.end(), target(match)
        if ahead and ahead > position and match[1]:
            inside = code.finditer(text, position, ahead)
            if not any(position < (target(other) or 0) <= other.start() for other in inside):
                position = ahead
    return found


def global_accesses(opcodes):
    """How many of each (ld or st, bits). From SASS: in the PTX of Triton 3.6 a value that many registers share is loaded many times."""
    bits = {"64": 64, "128": 128, "256": 256, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
    accesses = [opcode.split(".") for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
    return collections.Counter((name[:2].lower(), next((bits[part] for part in parts if part in bits), 32)) for name, *parts in accesses)
