"""Full garbage collections wait until a compilation ends, and the thresholds are back then."""

import gc

import pytest
import torch

from rewriter.full_collections import defer_full_collections


@pytest.mark.parametrize("fails", [False, True])
def test_full_collections_wait_while_dynamo_compiles(fails):
    before, during = gc.get_threshold(), []

    def backend(module, _):
        during.append(gc.get_threshold())
        if fails:
            raise ValueError("refused")
        return module

    torch._dynamo.reset()
    defer_full_collections()
    defer_full_collections()
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    except Exception:
        assert fails
    assert during == [(*before[:2], 1_000_000)]
    assert gc.get_threshold() == before


def test_a_threshold_that_was_set_meanwhile_stays():
    before = gc.get_threshold()

    def backend(module, _):
        gc.set_threshold(500, 5, 5)
        return module

    torch._dynamo.reset()
    defer_full_collections()
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        assert gc.get_threshold() == (500, 5, 5)
    finally:
        gc.set_threshold(*before)
