"""A frozen weight that is in host memory, on the device that computes, for as long as something reads it.

    F.linear(x, weight)  ->  F.linear(x, host_weight(x, weight))

A head of 8B takes 1.05 GB of the device all the time, and is read by the loss alone. Here it is there from
its copy, 19 ms at 55 GB/s, to the end of the loss. A copy that somebody began before (``COMING``) has had
that long to run beside what computes.

Forward alone: a weight in host memory is frozen. Where ``x`` is not on a GPU, this is the weight itself.

Refused: a weight that is trained, whose gradient and update belong on the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .registration import define

# Weights that are on their way, by their address: what they are copied to, and what makes the computing
# stream wait for the copy.
COMING: dict[int, tuple[Tensor, Callable[[], None]]] = {}


def host_weight(x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` on the device of ``x``, bit for bit; to be let go when it has been read.

    Args:
        x: of any shape and dtype; says where, and from when on the weight is needed.
        weight: dense, of any dtype, frozen; in host memory, or where ``x`` is.

    Raises:
        ValueError: ``weight`` is trained.
    """
    if weight.requires_grad:
        raise ValueError(
            "host_weight: the weight is trained, and its gradient belongs on the device; freeze it, or leave "
            "it there."
        )
    return torch.ops.rewriter.host_weight(x.detach(), weight) if _is_copied(x) else weight


def _is_copied(x: Tensor) -> bool:
    return x.is_cuda


def _kernel(x: Tensor, weight: Tensor) -> Tensor:
    address = weight.data_ptr()
    if address not in COMING or COMING[address][0].device != x.device:
        # From locked memory the host does not wait; one that is not locked is read before this returns.
        return _fake(x, weight).copy_(weight, non_blocking=True)
    made, wait = COMING.pop(address)
    wait()
    return made


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(weight.shape, dtype=weight.dtype)


define("host_weight(Tensor x, Tensor weight) -> Tensor", kernel=_kernel, fake=_fake, launches=False)
