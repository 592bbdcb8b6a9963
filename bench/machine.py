"""What ran where: the versions and the machine, as they are written above every table of results."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import normops
import normops.backends

# without these, glibc takes fresh pages from the system for every large result: page faults are measured instead of kernels
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def keep_pages(module: str, argv: list[str] | None) -> None:
    """Start ``python -m module`` again under MALLOC, which only counts from the start of a process."""
    if any(name not in os.environ for name in MALLOC):
        os.execve(sys.executable, [sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)], os.environ | MALLOC)


def default_backend(device: str) -> str:
    """The backend that normops is told to use, or the first that runs a small group norm on `device`."""
    if forced := os.environ.get("NORMOPS_BACKEND"):
        return forced
    x = torch.ones(1, 2, 4, device=device)
    for name in normops.backends.ORDER[device]:
        with contextlib.suppress(NotImplementedError), normops.backend(name):
            normops.group_norm(x, 1)
            return name
    raise RuntimeError(f"no backend of normops runs on {device}")


def processor(device: str) -> str:
    """The name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The machine's name as a part of a file name."""
    return f"{device}_{re.sub('[^a-z0-9]+', '-', processor(device).lower()).strip('-')}"


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache; 0 where it is not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def describe(device: str) -> dict[str, str]:
    """The machine and the versions, name -> value."""
    facts = {
        "machine": processor(device),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "last_level_cache_bytes": str(last_level_cache(device)),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "normops": f"{normops.__version__} (commit {_output('git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty')})",
        "backend": default_backend(device),
    }
    if device == "cuda":
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        facts |= {package: _version(package) for package in ("liger-kernel", "quack-kernels")}
    else:
        facts["simd"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
