"""A model's own dropout by position, without the compiler: what a compiled model's is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.dropout import dropped_reference


@contextmanager
def dropout_by_position() -> Iterator[None]:
    """Let each dropout of (batch, tokens, channels) draw a seed when it is called, and drop by position.

    On a CPU seeds drawn one by one are those that one draw gives.
    """
    own = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return own(x, p, training, inplace)
        seed = torch.empty(2, dtype=torch.int64).random_()
        return dropped_reference(x, torch.arange(x.shape[1]), seed, p)

    with patch.object(F, "dropout", dropout):
        yield
