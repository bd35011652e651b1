"""Models under a memory budget train as they do without; one that is too small is told before any work."""

import pytest
import torch

import rewriter
from rewriter.memory.arena import HostArena
from rewriter.memory.transfer import Transfers
from tests.families import build
from tests.memory.budgeted import (
    assert_near,
    batches_of,
    compiled,
    ending,
    infeasible,
    last_plan,
    short_tiles,
    staged,
    steps,
)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


def _checkpointed():
    model = build("llama", layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _tied():
    model = build("llama", layers=2)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def _adapted():
    model = build("phi3", layers=2, lora=True, nf4=True)
    # Then one class of layers: the first is as the second.
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


MODELS = {
    "adapters on 4-bit fused projections": _adapted,
    "gradient checkpointing": _checkpointed,
    "tied weights": _tied,
}


# Tied weights train in little more than their least below.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied weights"])
def test_one_that_is_too_small_names_the_least_that_would_do_and_training_is_the_same_under_it(name):
    model, batches = MODELS[name](), batches_of()
    error = infeasible(lambda: model, batches)
    assert "are needed, of which" in str(error) and f"memory_budget={error.least_device} is" in str(error)
    assert all(p.grad is None for p in model.parameters())
    torch._dynamo.reset()
    ours = steps(compiled(model, error.least_device), batches)
    assert_near(ours, steps(MODELS[name](), batches), 1e-5)
    assert staged() >= 2
    assert last_plan().peak <= last_plan().device_budget <= error.least_device
    told = "gradient checkpointing: what is computed again is as the memory plan says"
    assert (told in str(rewriter.report())) == (name == "gradient checkpointing")
    assert "0.00 GiB" not in str(rewriter.report()) + str(error)
    steps_of = [region.steps for region in rewriter.report().program.regions]
    assert sum("def backward(gradients):" in text for text in steps_of) >= 1 and "" in steps_of


def test_a_budget_between_mixes_ways_and_a_large_one_keeps_everything():
    batches = batches_of()
    make = MODELS["tied weights"]
    eager = steps(make(), batches)

    def under(budget):
        torch._dynamo.reset()
        assert_near(steps(compiled(make(), budget), batches), eager, 1e-5)
        return last_plan().peak, last_plan().seconds, staged()

    large, fast, none = under("1GB")
    small, slow, some = under(int(large * 0.93))
    assert small < large and some > none == 0
    # It is cut into layers otherwise: at this size, where launches are all that is foreseen, some are fewer.
    assert slow >= 0.9 * fast


# A step that does not come to its end: why, and where.
ENDS = [
    (torch.OutOfMemoryError, "run_backward", 3),
    (torch.OutOfMemoryError, "run", 3),
    (KeyboardInterrupt, "run_backward", 3),
    (KeyboardInterrupt, "run", 3),
]


def test_after_steps_that_ran_out_of_memory_or_were_interrupted_training_goes_on_and_in_smaller_batches(
    monkeypatch,
):
    transfers = Transfers(HostArena(64 << 20, pin=False, growth=1 << 20), "cpu", poison=True)
    monkeypatch.setattr("rewriter.memory.planned.transfers_of", lambda *_: transfers)
    make, batches, smaller = MODELS["tied weights"], batches_of(), batches_of((16,))
    # Everything that the step keeps is 1,466,848 bytes; 1,115,612 is the least that would do.
    ours, eager = compiled(make(), 1_120_000), make()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, eager)]
    assert_near(steps(ours, batches), steps(eager, batches), 1e-5)
    locked, kept = transfers.arena.capacity, []
    for error, method, at in ENDS:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(error, match="as the test wants it") as ended, ending(error, method, at):
            steps(ours, batches)
        # With the frames of the step, and by them its losses and layers.
        kept.append(ended.value)
        assert transfers.arena.in_use == 0
        ours.zero_grad()
        assert_near(steps(ours, smaller), steps(eager, smaller), 1e-5)
    assert_near(steps(ours, batches), steps(eager, batches), 1e-5)
    assert staged() >= 2 and transfers.arena.in_use == 0 < transfers.stats.bytes_out
    assert transfers.arena.capacity == locked and len(kept) == len(ENDS)


def test_a_failure_of_planning_is_noted_and_everything_is_kept(monkeypatch):
    def fail(*_):
        raise RuntimeError("no plan today")

    monkeypatch.setattr("rewriter.memory.under_budget.planned", fail)
    batches, make = batches_of(), MODELS["tied weights"]
    assert_near(steps(compiled(make(), 10_000), batches), steps(make(), batches), 1e-5)
    (graph,) = rewriter.report().graphs
    assert graph.memory is None and any("planning failed: no plan today" in note for note in graph.notes)
