"""Triton kernel of ``resident_rooms``: matrices of one dtype, each copied to its place, in one launch.

A row of the table is a matrix: addresses, sizes and strides. Some programs share one, and each walks through
it, so that the launch is as large for a few long matrices as for many short ones.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPAN = 2048
_PROGRAMS_A_MATRIX = 16
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _fill_kernel(
    table, scales, SOURCE: tl.constexpr, TARGET: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr
):
    number = tl.program_id(0)
    row = table + number * WIDTH
    source = tl.load(row).to(tl.pointer_type(SOURCE))
    target = tl.load(row + 1).to(tl.pointer_type(TARGET))
    count = tl.load(row + 2).to(tl.int32)
    columns = tl.load(row + 3).to(tl.int32)
    row_stride, column_stride, target_stride = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    scale = tl.load(scales + number)
    for start in tl.range(tl.program_id(1) * SPAN, count, tl.num_programs(1) * SPAN):
        at = start + tl.arange(0, SPAN)
        within = at < count
        y = at // columns
        x = (at - y * columns).to(tl.int64)
        y = y.to(tl.int64)
        value = tl.load(source + y * row_stride + x * column_stride, mask=within, other=0.0)
        value = (value.to(tl.float32) * scale).to(TARGET)
        tl.store(target + y * target_stride + x, value, mask=within)


class Table:
    """What one launch copies: ``matrices`` of one dtype, times ``scales``, into ``rooms`` of one dtype."""

    def __init__(self, rooms: Sequence[Tensor], matrices: Sequence[Tensor], scales: Sequence[float]):
        rows = [
            (m.data_ptr(), r.data_ptr(), m.numel(), m.shape[1], *m.stride(), r.stride(0))
            for r, m in zip(rooms, matrices, strict=True)
        ]
        device = rooms[0].device
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self._dtypes = _TYPES[matrices[0].dtype], _TYPES[rooms[0].dtype]

    def used_on(self, stream: torch.cuda.Stream) -> None:
        self._rows.record_stream(stream)
        self._scales.record_stream(stream)

    def fill(self) -> None:
        count, width = self._rows.shape
        with torch.cuda.device_of(self._rows):
            _fill_kernel[(count, _PROGRAMS_A_MATRIX)](
                self._rows, self._scales, *self._dtypes, WIDTH=width, SPAN=_SPAN
            )
