"""A head in host memory on a GPU: read there bit for bit, gone behind the loss, ahead under a plan."""

# Models are known by what they are at run time.
# pyright: reportCallIssue=false

import pytest
import torch

import rewriter
from rewriter.huggingface import prepare, restore
from rewriter.kernels.host_weight import COMING, host_weight
from rewriter.memory.budgets import card_bytes
from rewriter.memory.head_ahead import HeadAhead
from rewriter.memory.streams import streams_of
from tests.families import batch, build
from tests.gpu.test_host_embedding import locked
from tests.memory.budgeted import steps
from tests.memory.on_device import (
    CONTEXT,
    NEAR,
    MiB,
    Sizes,
    compiled,
    distance,
    free_bus,
    poisoned,
    small_llama,
    step,
    tokens,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_weight_is_copied_from_locked_memory_when_it_is_asked_for():
    given = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda")
    weight, _slab = locked(given)
    assert torch.equal(host_weight(torch.empty(1, device="cuda"), weight), given)
    assert torch.equal(host_weight(torch.empty(1, device="cuda"), weight.clone()), given)


def test_a_copy_that_was_begun_comes_beside_what_computes_and_is_waited_for():
    device = torch.device("cuda", torch.cuda.current_device())
    given = torch.randn(65536, 4096, dtype=torch.bfloat16, device=device)
    weight, _slab = locked(given)
    ahead, x = HeadAhead(device, streams_of(device)), torch.randn(8192, 8192, device=device)
    for _ in range(3):
        # Of memory that something still computes in, with other values behind.
        poison = torch.full_like(given, float("nan"))
        poison.add_(1)
        del poison
        ahead(weight)
        torch.mm(x, x)
        found = host_weight(x, weight)
        assert torch.equal(found, given) and not COMING
        del found
    ahead(weight)
    before = torch.cuda.memory_allocated()
    ahead.let_go()
    assert not COMING and before - torch.cuda.memory_allocated() >= given.nbytes


@pytest.mark.parametrize("tied", [False, True], ids=["its own weight", "tied"])
def test_steps_are_the_same_with_the_head_in_host_memory(device, tied):
    given, found = [batch(length=64, device=device)] * 3, []
    for host in (("embedding", "head"), ()):
        torch._dynamo.reset()
        model = build("llama", lora=True, dtype=torch.bfloat16, device=device)
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        prepare(model, host=host)
        # Of tensors on two devices nothing is recorded; without the host's, neither.
        model.compile(backend="rewriter", options={"cuda_graphs": False})
        losses, gradients = steps(model, given)
        with torch.no_grad():
            logits = model(input_ids=given[0]["input_ids"]).logits
        found.append((losses, gradients, model(**given[0]).logits.detach() + 0, logits))
        assert model.device.type == "cuda"
        restore(model)
        assert model.get_output_embeddings().weight.is_cuda
    (ours, mine, read, logits), (theirs, others, expected, without_labels) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert mine and all(torch.equal(mine[name], gradient) for name, gradient in others.items())
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, without_labels, rtol=0, atol=0)


def test_it_is_gone_from_the_device_before_the_backward(device):
    left = []
    for host in ("head", ()):
        model, ids = small_llama(device, Sizes(layers=2), nf4=False), tokens(1024, device)
        prepare(model, host=host)
        compiled(model, "off")
        step(model, ids)
        before = torch.cuda.memory_allocated()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        left.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    # The weight has 4 MiB.
    assert left[0] <= left[1] + MiB // 2


@pytest.mark.parametrize("host", ["head", ("embedding", "head", "layers")])
def test_under_a_plan_it_comes_ahead_and_the_step_stays_within_the_memory_foreseen(device, host):
    model, ids = small_llama(device, Sizes(), nf4=True), tokens(16384, device)
    whole = step(compiled(model, "off"), ids)
    before = torch.cuda.memory_allocated()
    prepare(model, host=host)
    assert before - torch.cuda.memory_allocated() >= model.get_output_embeddings().weight.nbytes
    budget = card_bytes(whole.before + int((whole.peak - whole.before) * 0.7))
    with free_bus(), poisoned(device) as transfers:
        compiled(model, budget)
        for _ in range(3):
            ours = step(model, ids)
            assert distance(ours, whole) < NEAR
            assert not COMING
    restore(model)
    (note,) = {note for graph in rewriter.report().graphs for note in graph.notes if note.startswith("head:")}
    assert "while the last layer" in note
    assert ours.peak <= budget - CONTEXT
    assert transfers.arena.in_use == 0
