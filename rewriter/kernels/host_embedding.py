"""Rows of an embedding whose weight is in host memory, as a tensor of the device that computes.

A batch of 8,192 tokens reads 64 MiB of a table of 1 GB (hidden 4096, bf16): the table need not be on the
device. Where its memory is page-locked, one kernel reads the rows over the bus, each once, and writes them:
64 MiB, 1.2 ms at 55 GB/s. The host is not waited for, nor does it know the ids; the kernel can be recorded.
Memory that is not locked is no address to a device: there the ids come to the host, which waits for them,
and the rows go back.

Forward alone: a weight in host memory is frozen. An id that is not in the table gives a row of NaN.

Refused: a trained weight, and what ``torch.nn.functional.embedding`` does beyond reading rows (``max_norm``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import define


def host_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """``weight[ids]``, in the dtype of ``weight`` and on the device of ``ids``. Bit for bit the rows.

    Args:
        ids: (...), int64 or int32.
        weight: (rows, hidden), frozen; on the host, or where ``ids`` are.

    Returns:
        (..., hidden).

    Raises:
        ValueError: ``weight`` is trained, or no matrix.
        TypeError: ``ids`` are no integers.
    """
    _check(ids, weight)
    return torch.ops.rewriter.host_embedding(ids, weight) if ids.is_cuda else F.embedding(ids, weight)


def _check(ids: Tensor, weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError(
            "host_embedding: the weight is trained, and its gradient belongs on the device; freeze it, or "
            "leave it there."
        )
    if weight.dim() != 2:
        raise ValueError(f"host_embedding: weight {tuple(weight.shape)}; expected (rows, hidden).")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"host_embedding: ids are {ids.dtype}; int64 and int32 are possible.")


def _kernel(ids: Tensor, weight: Tensor) -> Tensor:
    if ids.device != weight.device and not weight.is_pinned():
        return F.embedding(ids.to(weight.device), weight).to(ids.device)
    from .host_embedding_triton import launch

    out = ids.new_empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)
    launch(ids.contiguous(), weight.detach(), out)
    return out


def _fake(ids: Tensor, weight: Tensor) -> Tensor:
    return ids.new_empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)


define("host_embedding(Tensor ids, Tensor weight) -> Tensor", kernel=_kernel, fake=_fake)
