"""Two draws of seeds stay two: PyTorch's partitioner takes calls that look alike for one, but some of a list.

It does not read an op's tags. The bodies of two checkpoints each draw seeds of their own, and are one graph
after autograd, in which both calls look alike.
"""

import functools

import torch

from rewriter.kernels import dropout  # noqa: F401  (defines the op)


@functools.cache
def keep_draws_apart() -> None:
    """Before anything is partitioned; once is enough."""
    from torch._functorch import compile_utils

    compile_utils.rand_ops.append(torch.ops.rewriter.dropout_seeds)
