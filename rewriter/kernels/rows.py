"""What ops over rows share: the guards of their operands, and results in the models' own memory order."""

import torch
from torch import Tensor

HIDDEN_LIMIT = 65536
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def hidden_fits(hidden: int) -> bool:
    """Whether one program can hold a row of ``hidden`` elements: the guard of every norm here."""
    return hidden <= HIDDEN_LIMIT


def dense_rows(
    x: Tensor, dtype: torch.dtype, device: torch.device | str | None = None, room: int = 0
) -> Tensor:
    """An empty dense tensor of ``x``'s shape, rows innermost, in the memory order that eager would give it.

    Views that follow a norm (``norm(q.transpose(1, 2)).transpose(1, 2).view(...)``) rely on that order. With
    ``room`` for so many columns more in each row it is contiguous.
    """
    if room:
        return x.new_empty((*x.shape[:-1], x.shape[-1] + room), dtype=dtype, device=device)
    out = torch.empty_like(x, dtype=dtype, device=device)
    if out.stride(-1) == 1:
        return out
    return torch.empty(out.shape, dtype=dtype, device=out.device)


def row_statistic(y: Tensor) -> Tensor:
    """An empty fp32 value a row of the dense ``y``, shape (...), in ``y``'s memory order."""
    if y.shape[-1] == 0:
        return y.new_empty(y.shape[:-1], dtype=torch.float32)
    return torch.empty_like(y.select(-1, 0), dtype=torch.float32)


def per_head(weight: Tensor | None) -> bool:
    """Whether a norm's weight is (heads, hidden), one row for each place of the last dimension but one."""
    return weight is not None and weight.dim() == 2


def check_norm(op: str, x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> None:
    """Raise unless the kernels take these operands; ``parameters`` are (hidden,) or None."""
    if x.dim() == 0:
        raise ValueError(f"{op}: the input is a scalar; it needs a last dimension to normalise over.")
    if not hidden_fits(x.shape[-1]):
        raise ValueError(
            f"{op}: last dimension {x.shape[-1]} exceeds {HIDDEN_LIMIT}, the most one program can hold; "
            "leave it unfused (guard with hidden_fits)."
        )
    for tensor in (x, residual, *parameters):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {tensor.dtype} operand, not bf16, fp16 or fp32; use the reference.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual {tuple(residual.shape)} and input {tuple(x.shape)} differ; expand it first."
        )
    for parameter in parameters:
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: parameter of shape {tuple(parameter.shape)}; the last dimension is {x.shape[-1]}."
            )
