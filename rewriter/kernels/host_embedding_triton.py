"""Triton kernel of ``host_embedding``: a program reads a part of a row wherever it lies, and writes it.

Over the bus what counts is how much is asked for at once: a program asks for 4 KB, and thousands of them run.
"""

# Triton types a kernel as the plain function below its decorator: launch options look like errors.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

_BYTES = 4096
_WARPS = 4


@triton.jit
def _gather_kernel(ids, weight, out, rows, hidden, stride_row, stride_column, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    readable = tl.where((row >= 0) & (row < rows), hidden, 0)
    at = weight + row * stride_row + column * stride_column
    value = tl.load(at, mask=column < readable, other=float("nan"))
    tl.store(out + token * hidden + column, value, mask=column < hidden)


def launch(ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``weight[ids]`` to the dense ``out``; ``weight`` may be page-locked host memory."""
    if not out.numel():
        return
    rows, hidden = weight.shape
    block = min(triton.next_power_of_2(hidden), _BYTES // weight.element_size())
    grid = (ids.numel(), triton.cdiv(hidden, block))
    _gather_kernel[grid](ids, weight, out, rows, hidden, *weight.stride(), BLOCK=block, num_warps=_WARPS)
