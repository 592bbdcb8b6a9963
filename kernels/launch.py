"""Launches: kernel[grid](...) costs 9 us of Python a call, most of it to find the compiled kernel again; this finds it in 2.

The key holds all that selects a binary: kernel, warps, device, every int and constexpr, every dtype. Tensors whose address is
not a multiple of 16 bytes compile differently, one by one, so they (rare) always take Triton's own way, as does everything when
the interpreter runs, when a launch hook wants to see the launch, or when Triton's private launch call is not there.
"""

import os

import torch
import triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CAPACITY = 4096  # shapes in flight; a program that meets more of them starts over
_compiled = {}

try:
    _current_stream = torch._C._cuda_getCurrentRawStream
    _hooks = triton.knobs.runtime.launch_enter_hook.calls
except AttributeError:
    _current_stream = None


def launch(kernel, programs, num_warps, *args):
    """Run `programs` programs of `kernel` on the device of the first tensor, on its current stream."""
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if INTERPRET:
        return kernel[(programs,)](*args, **options)
    device = args[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, num_warps, *args)
    address = 0
    key = [kernel.fn, num_warps, device]
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address |= arg.data_ptr()
            key.append(arg.dtype)
        else:
            key.append(arg)
    if _current_stream is None or _hooks or address % 16:
        return kernel[(programs,)](*args, **options)
    key = tuple(key)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= CAPACITY:
            _compiled.clear()
        _compiled[key] = kernel[(programs,)](*args, **options)
    else:
        compiled.run(programs, 1, 1, _current_stream(device), compiled.function, compiled.packed_metadata, None, None, None, *args)
