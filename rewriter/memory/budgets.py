"""What there is to plan with: bytes of the device and of the host, and what is taken already.

A budget is the share of the device that the process may take, the driver's context included, as if the card
were that large; without one it is what this process has and what is free beside it. Beside weights, gradients
of what is trained and two tensors of its size for the optimizer, as AdamW has, are taken to be there all the
time. Those that are there already are not counted twice: gradients come and go with each step, so that the
tensors themselves are asked for theirs; the optimizer's are known by what else is allocated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from rewriter.canonical import value_of
from rewriter.memory.costs import value_bytes
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.host_share import host_share, machine_memory
from rewriter.memory.shelf import shelf_of
from rewriter.regions.program import Program
from rewriter.replay.recorded import recorded_bytes

_CONTEXT = 600 << 20
# Of it, what comes after the first allocation: kernels are loaded at their first launch.
_KERNELS = 200 << 20
# cuBLAS's workspaces, one a handle and stream, come from the allocator at the first product.
_WORKSPACES = 96 << 20
# What the allocator holds and cannot use, for being in pieces.
_PIECES = 0.025
# And at the ends of what is there all the time: it maps pages of 20 MiB.
_PAGES = 64 << 20
# Gradient, and AdamW's two moments.
_TENSORS_A_TRAINED_ONE = 3


@dataclass(frozen=True)
class Budgets:
    """Bytes: that plans may fill, that this process may offload to, and that are there all the time.

    ``growth``: of the batch that the plan has to hold for; ``reach``: how many times the tokens at hand those
    after it do.
    """

    device: int
    host: int
    static: int
    growth: Growth = AS_TRACED
    reach: float = 1.0


def budgets(
    program: Program,
    memory_budget: int | float | None,
    host_budget: int | float | None,
    device: torch.device,
    inputs: Sequence[Any] | None = None,
) -> Budgets:
    """What the options ask for, on the device that runs the program; what is free where that is None.

    Args:
        inputs: of a call of the program that is planned for later than it was traced.
    """
    usable = free_bytes(device) if memory_budget is None else None
    if usable is None:
        total = device_bytes(device)
        share = 1.0 if memory_budget is None else memory_budget
        card = int(share * total) if isinstance(share, float) else min(share, total)
        usable = usable_bytes(card, device)
    return Budgets(usable, host_share(host_budget), static_bytes(program, device, inputs))


def usable_bytes(card: int, device: torch.device | None = None) -> int:
    """What tensors may take of a card: all but the driver's context, and what is lost in pieces.

    Args:
        device: None for a GPU.
    """
    context, workspaces, pages = _taken(device)
    return max(int((card - context) * (1 - _PIECES)) - workspaces - pages, 0)


def free_bytes(device: torch.device) -> int | None:
    """What tensors may take, those that are there included, of what nobody else has; None on a CPU.

    A CPU's memory is not planned unasked: it is shared, and can be swapped.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    room = free - _KERNELS + torch.cuda.memory_reserved(device)
    # By its index: torch 2.11 takes no device without one here.
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
    return max(int(min(room, allowed) * (1 - _PIECES)) - _WORKSPACES - _PAGES, 0)


def device_of(example_inputs: Sequence[Any]) -> torch.device:
    """That of a program's tensors, but for weights in host memory."""
    devices = (x.device for x in example_inputs if isinstance(x, Tensor))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def card_bytes(usable: int, device: torch.device | None = None) -> int:
    """The card on which tensors may take ``usable`` bytes: what ``usable_bytes`` is asked with."""
    context, workspaces, pages = _taken(device)
    return ceil((usable + workspaces + pages) / (1 - _PIECES)) + context + 1


def allocated_bytes(usable: int, device: torch.device | None = None) -> int:
    """What the allocator may have given out where tensors take ``usable`` bytes: workspaces are of it."""
    return usable + _taken(device)[1]


def _taken(device: torch.device | None) -> tuple[int, int, int]:
    """Of the device, of what the allocator gives out, and of what it cannot."""
    return (_CONTEXT, _WORKSPACES, _PAGES) if device is None or device.type == "cuda" else (0, 0, 0)


def foreseen_bytes(weights: int, trained: int) -> int:
    """What is there all the time of a model whose weights, and trained ones, take so many bytes."""
    return weights + trained * _TENSORS_A_TRAINED_ONE


def static_bytes(program: Program, device: torch.device, inputs: Sequence[Any] | None = None) -> int:
    """Weights, inputs, gradients and optimizer states, and whatever else is on the device.

    Args:
        inputs: as of ``budgets``.
    """
    values = inputs or [value_of(n) for n in program.source.graph.find_nodes(op="placeholder")]
    tensors = [x for x in values if isinstance(x, Tensor) and x.device.type == device.type]
    given = sum(value_bytes(x) for x in tensors)
    trained = sum(value_bytes(x) for x in tensors if x.requires_grad)
    if device.type != "cuda":
        return foreseen_bytes(given, trained)
    gradients = (x.grad for x in tensors if x.requires_grad and x.is_leaf)
    held = sum(value_bytes(gradient) for gradient in gradients)
    # Weights that stay dequantised give way to a plan that needs their room.
    allocated = torch.cuda.memory_allocated(device) - shelf_of(str(device)).nbytes
    return with_what_comes(allocated, given, trained, held) + recorded_bytes(device)


def with_what_comes(allocated: int, given: int, trained: int, gradients: int) -> int:
    """Bytes that are there at a step's worst moment, of which ``allocated`` are now.

    Args:
        given: weights and inputs.
        trained: of the weights, those that are trained.
        gradients: those that are there.
    """
    states = trained * (_TENSORS_A_TRAINED_ONE - 1)
    # Less than half of them is there beside weights and gradients: no optimizer has stepped yet.
    coming = states if allocated - given - gradients < states / 2 else 0
    return max(allocated + coming + max(trained - gradients, 0), foreseen_bytes(given, trained))


def device_bytes(device: torch.device) -> int:
    """Of the device; of the host where it is the device."""
    return (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_memory()
    )
