"""What of a budget is left to PyTorch's allocator, and how much longer a step takes where it is not.

A request that fits in none of its gaps, the allocator meets by unmapping them, for which it waits until the
device is idle, and mapping as much elsewhere. What is kept, and what is computed in turn, leaves few gaps.
Tensors on their way to host memory and back are let go among others of other sizes, and leave many: 32 layers
of 8B at 50,000 tokens had 23.0 GiB reserved where 18.9 were there at most, 6.6 of them weights
(``examples/benchmarks/context.py``). A plan that does with so much less takes 1% longer or so: by
``rewriter.plan`` 7.28 s in 24 GiB, 7.35 in 21, 7.44 in 18.
"""

# Of the device budget, what a step fills where it can.
_ROOMY = 0.94
# Of what the budget leaves beside weights, what a step that offloads fills where it can.
_SPACIOUS = 0.82
# How many times as long a step is foreseen to take that offloads and leaves less, for the waits of it.
_IN_PIECES = 1.025
# And one that leaves nothing.
_CROWDED = 1.1


def roomy_bytes(device_budget: int) -> int:
    """Of ``device_budget``, what a step fills where it can, whether it keeps everything or has a plan."""
    return int(device_budget * _ROOMY)


def spacious_bytes(device_budget: int, static: int) -> int:
    """The same of a step that offloads, beside ``static`` bytes that are there all the time."""
    spacious = static + int(_SPACIOUS * (device_budget - static))
    return min(spacious, roomy_bytes(device_budget))


def in_pieces(step_seconds: float) -> float:
    """What a step of so many seconds takes that offloads, and leaves the allocator few gaps."""
    return _IN_PIECES * step_seconds


def crowded(step_seconds: float) -> float:
    """What a step of so many seconds takes that leaves the allocator no room."""
    return _CROWDED * step_seconds
