"""Weights that stay dequantised, on a GPU: the same bits, the memory foreseen, recordings that read them."""

import gc

import pytest
import torch

from rewriter.memory.shelf import shelf_of
from tests.gpu.recorded import notes
from tests.memory.budgeted import write_other_weights
from tests.memory.on_device import Sizes, compiled, distance, plan, small_llama, step, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BUDGET = "40GB"
# Large enough that dequantising is a share of a step that is worth a choice.
SIZES = Sizes(hidden=2048, inner=5632, heads=16, groups=8)
# Of bf16 products of as many rows as a bucket has, four layers deep: 1.0e-2 on an H200.
NEAR = 2e-2


@pytest.fixture
def model(device):
    return small_llama(device, SIZES, nf4=True)


def update(model):
    """Past PyTorch's counter of writes, as fused optimizers do."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.01)


def shelf(device):
    return shelf_of("cuda:0" if device == "cuda" else device)


def steps(model, lengths, device):
    """Whole steps, with an update after each and other weights in the middle."""
    found = []
    for number, length in enumerate(lengths):
        found.append(step(model, tokens(length, device, number)))
        update(model)
        if number == len(lengths) // 2:
            write_other_weights(model)
    return found


def test_steps_have_the_same_bits_and_the_memory_that_was_foreseen(device, model):
    lengths = (256,) * 4
    expected = steps(compiled(model, "off"), lengths, device)
    model = small_llama(device, SIZES, nf4=True)
    ours = steps(compiled(model, BUDGET), lengths, device)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.loss, theirs.loss)
        assert all(torch.equal(mine.gradients[n], gradient) for n, gradient in theirs.gradients.items())
    assert any(note.startswith("resident: 4 of 4 layers' weights") for note in notes())
    if device == "cuda":
        assert max(one.peak for one in ours) <= plan().peak * 1.1


def test_recordings_read_what_stays_and_see_a_weight_that_changes(device, model):
    lengths = (200, 230, 199, 255, 240, 220, 201, 250)
    expected = steps(compiled(model, "off", dynamic=None), lengths, device)
    model = small_llama(device, SIZES, nf4=True)
    ours = steps(compiled(model, BUDGET, dynamic=None, cuda_graphs=True), lengths, device)
    for mine, theirs in zip(ours, expected, strict=True):
        assert distance(mine, theirs) < NEAR
    assert any(note.startswith("resident: 4 of 4 layers' weights") for note in notes())
    if device == "cuda":
        assert (
            any(note.startswith("CUDA graphs: length 256 recorded") for note in notes())
            and shelf(device).kept
        )


def alternating(budget, device):
    """Two models' steps in turn, and after each pair how often something was made or given up."""
    torch._dynamo.reset()
    gc.collect()
    models = [compiled(small_llama(device, SIZES, nf4=True), budget) for _ in range(2)]
    found, changes = [], []
    for number in range(3):
        for model in models:
            found.append(step(model, tokens(256, device, number)))
            update(model)
        changes.append(shelf(device).changes)
    return found, changes


def test_two_models_that_alternate_keep_theirs_and_give_them_back_with_the_models(device):
    expected, _ = alternating("off", device)
    ours, changes = alternating(BUDGET, device)
    assert len(set(changes)) == 1
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.loss, theirs.loss)
        assert all(torch.equal(mine.gradients[n], gradient) for n, gradient in theirs.gradients.items())
    # Their packed weights are gone.
    gc.collect()
    assert not shelf(device).nbytes


def test_steps_on_two_streams_in_turn_have_the_same_bits(device, model):
    if device != "cuda":
        pytest.skip("no streams")
    ids, found = tokens(256, device), []
    expected = step(compiled(model, "off"), ids)
    compiled(model, BUDGET)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for number in range(6):
        with torch.cuda.stream(streams[number % 2]):
            # Some 10 ms, by which the next stream would be ahead.
            torch.cuda._sleep(20_000_000)
            found.append(step(model, ids))
        if number == 3:
            # They are made again on the other stream, while this one reads them.
            for key in list(shelf(device).kept):
                shelf(device).drop(key)
    torch.cuda.synchronize()
    assert shelf(device).kept
    for ours in found:
        assert torch.equal(ours.loss, expected.loss)
        assert all(torch.equal(ours.gradients[n], gradient) for n, gradient in expected.gradients.items())
