"""Mean and variance of an activation of normal variables, and their derivatives: choose the map and the block, launch."""

import functools

import torch
import triton
import triton.language as tl

from .config import divide
from .launch import INTERPRET, launch
from .maps import ELU, HARDSIGMOID, HARDSWISH, HARDTANH, LEAKY_RELU, PANEL, SIGMOID, TINY, spread

RELU, RELU6, SELU = 1, 5, 14
SAME = {
    RELU: (LEAKY_RELU.value, 0.0, 0.0),
    RELU6: (HARDTANH.value, 0.0, 6.0),
    SELU: (ELU.value, 1.6732632423543772, 1.0507009873554805),
}
KINKED = (HARDTANH.value, HARDSIGMOID.value, HARDSWISH.value, ELU.value)
# From sigmoid on, the step in x that leaves an error of at most 1e-13 in all six: by the nearest pole, or where there is none by the width of f'.
WIDTHS = (0.42, 0.2, 0.4, 0.44, 0.22, 0.43, 0.34, 0.3)


@triton.jit(do_not_specialize=["n"])
def _activation_moments_kernel(
    out_ptr, mean_ptr, var_ptr, legendre_ptr, n, first: "fp64", second: "fp64",
    MAP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """out (6, n): m, V, dm/dmu, dm/dv, dV/dmu, dV/dv. Without variance those that have no limit, or an infinite one, are 0."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = i < n
    mu = tl.load(mean_ptr + i, mask, 0.0)
    var = tl.load(var_ptr + i, mask, 0.0)
    certain = var <= TINY
    v = tl.where(certain, 1e-300, var)
    first, second = tl.full((), first, tl.float64), tl.full((), second, tl.float64)
    m, variance, m_mu, m_v, v_mu, v_v = spread(mu, v, first, second, legendre_ptr, MAP, WIDTH, NODES)
    variance = tl.where(certain | (variance < 0.0), 0.0, variance)  # a difference may round below 0
    place, stride = out_ptr + i, n.to(tl.int64)
    tl.store(place, m, mask)
    tl.store(place + stride, variance, mask)
    tl.store(place + 2 * stride, m_mu, mask)
    tl.store(place + 3 * stride, tl.where(certain, 0.0, m_v), mask)
    tl.store(place + 4 * stride, tl.where(certain, 0.0, v_mu), mask)
    tl.store(place + 5 * stride, tl.where(certain, m_mu * m_mu, v_v), mask)


@functools.cache
def _legendre(device):
    """PANEL nodes on [-1, 1] and their weights, from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, PANEL.value, dtype=torch.float64, device="cpu")
    beside = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return torch.cat((nodes, 2 * vectors[0].square())).to(device)


def activation_moments_fwd(out, mean, var, function, first, second):
    """Write out (6, n)."""
    if not (mean.is_cuda or INTERPRET):
        raise NotImplementedError(f"activation_moments: Triton kernels run on CUDA tensors, not on {mean.device.type}")
    forward(None, out, mean, var, function, first, second)


def forward(rows, out, mean, var, function, first, second):
    """rows: how many elements a program takes, None for the usual number."""
    function, first, second = SAME.get(function, (function, first, second))
    width = WIDTHS[function - SIGMOID.value] if function >= SIGMOID.value else None
    kinked = function in KINKED
    # A warp for each integral, a thread for each closed form.
    rows, nodes = rows or (4 if kinked or width else 128), PANEL.value if kinked or width else 1
    launch(
        _activation_moments_kernel, divide(mean.numel(), rows), 4, out, mean, var, _legendre(mean.device) if kinked else None,
        mean.numel(), first, second, function, width, rows, nodes,
    )  # fmt: skip
