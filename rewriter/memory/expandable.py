"""Whether PyTorch's allocator was asked to let its segments grow, which a plan that offloads counts on.

Without, it takes a block of its own of the driver for each size that fits into none, and cannot join what is
free of two of them: a step that the plan fits into its budget may then run out of memory, or wait for the
allocator often. The setting is read once, when the process first uses the GPU, so that it is said and not
done here.
"""

import os

import torch

from rewriter.memory.plan import MemoryPlan

# The name of both devices' allocators, and the older one.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SETTING = "expandable_segments:True"


def in_fixed_segments(plan: MemoryPlan, device: torch.device) -> tuple[str, ...]:
    """A note for the report where ``plan`` offloads and the environment does not ask for it; else none."""
    if device.type != "cuda" or not plan.hosted:
        return ()
    if any(_SETTING in os.environ.get(name, "").replace(" ", "") for name in _VARIABLES):
        return ()
    return (
        f"memory: set PYTORCH_CUDA_ALLOC_CONF={_SETTING} before Python starts; without it PyTorch's "
        "allocator needs more memory than its tensors, for being in pieces",
    )
