"""``python -m normops``: the versions, and which backend can run which op here, or why not."""

import importlib.metadata
import os

import torch

import normops
from normops import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def report() -> str:
    """The text that ``python -m normops`` prints."""
    names = dict.fromkeys(name for order in backends.ORDER.values() for name in order)
    devices = {name: "/".join(device for device, order in backends.ORDER.items() if name in order) for name in names}
    reasons = {name: backends.unavailable(name) for name in devices}
    facts = {
        "normops": f"{normops.__version__}, {os.path.dirname(normops.__file__)}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA": f"{torch.version.cuda or 'not in this torch'}, {_gpu()}",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "order": "; ".join(f"{device}: {', '.join(order)}" for device, order in backends.ORDER.items()),
    }
    if forced := os.environ.get("NORMOPS_BACKEND"):
        facts["forced"] = f"{forced}, by NORMOPS_BACKEND"
    lines = [f"{name:<9}{value}" for name, value in facts.items()]
    width = max(map(len, (*backends.OPS, "tensors on")))
    lines += ["", " " * width + "".join(f"{name:>11}" for name in devices)]
    lines += [f"{'tensors on':<{width}}" + "".join(f"{device:>11}" for device in devices.values())]
    lines += [f"{op:<{width}}" + "".join(f"{'no' if reason else 'yes':>11}" for reason in reasons.values()) for op in backends.OPS]
    lines += [""] * any(reasons.values())
    lines += [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
