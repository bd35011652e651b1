"""Hooks of saved tensors (``saved_tensors_hooks``, ``save_on_cpu``, a checkpoint around the model) where they
must not see what is saved: fake tensors of a compilation, which is no part of the step that it happens in.

A checkpoint counts what a step saves and finds another number when it runs it again, compiled by then; a hook
that writes tensors away cannot write fake ones. Dynamo and AOTAutograd trace without hooks for that reason,
and what is computed here with fake tensors between the two must do so too; so must what runs but to compare.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

_autograd = cast(Any, torch._C)._autograd


@contextmanager
def without_saved_hooks() -> Iterator[None]:
    """No hook is called within. AOTAutograd still finds those that it makes part of a graph."""
    prior = _autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        _autograd._saved_tensors_hooks_set_tracing(prior)


@contextmanager
def beside_saved_hooks() -> Iterator[None]:
    """The caller's hooks see nothing of what runs within, on real tensors; hooks that are set within do."""
    if not has_saved_hooks():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def has_saved_hooks() -> bool:
    """Whether hooks see what is saved now."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None
