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


def test_no_full_collection_is_due_the_moment_that_a_compilation_ends():
    due, full = gc.get_threshold()[2], []

    def backend(module, _):
        for _ in range(2 * due):
            gc.collect(1)
        return module

    def count(phase, about):
        full.append(phase == "start" and about["generation"] == 2)

    torch._dynamo.reset()
    defer_full_collections()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    gc.callbacks.append(count)
    try:
        compiled(torch.ones(2))
        kept = [[] for _ in range(2 * gc.get_threshold()[0])]
    finally:
        gc.callbacks.remove(count)
    assert kept and full and not any(full)
    assert gc.get_count()[2] < due


def test_objects_that_somebody_froze_stay_frozen():
    torch._dynamo.reset()
    defer_full_collections()
    gc.freeze()
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
