"""``total + alpha · left @ right`` into ``total``'s own memory.

``torch.addmm`` of a compiled graph has a result of its own: a compiler copies ``total`` there before cuBLAS
adds to it, 2·M·N reads and writes that move every byte of a LoRA linear's result once more. Here the product
adds to ``total`` where it lies, as cuBLAS can (β = 1). Of two products the longer one should add: it reads
``total`` while others of its tiles compute. The op says that it writes, so that a compiler
orders it, and gives it a copy where somebody else still reads ``total``.

Rounded once, as ``torch.addmm`` is, with sums in fp32. No gradient: it is used inside backwards and autograd
functions only. Refuses what ``torch.addmm`` refuses.
"""

import torch
from torch import Tensor

from .registration import define


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """``total + alpha · left @ right``; ``total`` may not be read any more.

    Args:
        total: (M, N), overwritten on a GPU.
        left, right: (M, K) and (K, N), of the dtype of ``total``.

    Returns:
        (M, N): ``total`` itself on a GPU, a tensor of its own elsewhere.
    """
    if not total.is_cuda:
        return torch.addmm(total, left, right, alpha=alpha)
    torch.ops.rewriter.add_product_(total, left, right, alpha)
    return total


def _kernel(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    torch.addmm(total, left, right, alpha=alpha, out=total)


def _fake(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    return None


add_product_ = define(
    "add_product_(Tensor(a!) total, Tensor left, Tensor right, float alpha) -> ()",
    kernel=_kernel,
    fake=_fake,
    launches=False,
)
