"""Launches: kernel[grid](...) costs 9 us of Python a call, most of it to find the compiled kernel again; this finds it in 2.

The key holds all that selects a binary: kernel, warps, device, every int and constexpr, every dtype. Tensors whose address is
not a multiple of 16 bytes compile differently, one by one, so they (rare) always take Triton's own way, as does everything when
the interpreter runs, when a launch hook wants to see the launch, or when Triton's private launch call is not there.
"""

import os

import torch
import triton

from .exchange import SPACING

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CAPACITY = 4096  # shapes in flight; a program that meets more of them starts over
COOPERATIVE = {"launch_cooperative_grid": True, "maxnreg": 128}  # two programs of 8 warps a processor, as config.Device says
_compiled = {}
_pointers = {}  # how many arguments of a kernel, the first ones, are tensors
_counters = {}

try:
    _current_stream = torch._C._cuda_getCurrentRawStream
    _hooks = triton.knobs.runtime.launch_enter_hook.calls
except AttributeError:
    _current_stream = None


def counters(x, teams):
    """Those of kernels/exchange.py on the device of x, each 0: the current stream's own, or of a graph that is being captured, which may be
    replayed on any stream, fresh ones that the graph sets to 0."""
    size = teams * SPACING.value
    if INTERPRET:
        return torch.zeros(size, dtype=torch.int32)
    key = torch.cuda.current_stream(x.device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=x.device)
    if key not in _counters or _counters[key].numel() < size:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=x.device)
    return _counters[key]


def launch(kernel, programs, num_warps, *args, cooperative=False):
    """Run `programs` programs of `kernel` on the device of the first tensor, on its current stream. cooperative: all at once or not at all."""
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if INTERPRET:
        return kernel[(programs,)](*args, **options)
    if cooperative:
        options |= COOPERATIVE
    device = args[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, num_warps, *args, cooperative=cooperative)
    count = _pointers.get(kernel.fn)
    if count is None:
        count = _pointers[kernel.fn] = sum(name.endswith("_ptr") for name in kernel.arg_names)
    address, dtypes = 0, []
    for tensor in args[:count]:
        if tensor is None:
            dtypes.append(None)
        else:
            address |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
    if _current_stream is None or _hooks or address % 16:
        return kernel[(programs,)](*args, **options)
    key = (kernel.fn, num_warps, device, args[count:], *dtypes)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= CAPACITY:
            _compiled.clear()
        _compiled[key] = kernel[(programs,)](*args, **options)
    else:
        compiled.run(programs, 1, 1, _current_stream(device), compiled.function, compiled.packed_metadata, None, None, None, *args)
