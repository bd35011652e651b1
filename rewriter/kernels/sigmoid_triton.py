"""The sigmoid that the gates' kernels share, exact at both ends."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """``sigmoid(x)`` and ``sigmoid(-x)``: no subtraction from 1, and an exponential that cannot overflow."""
    decay = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + decay)
    smaller = decay * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)
