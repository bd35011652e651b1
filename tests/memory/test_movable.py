"""Which weights of a program an error says could be in host memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rewriter.fusion import apply
from rewriter.hostable import checked, could_live_in_host_memory
from rewriter.huggingface import prepare
from rewriter.memory.movable import movable_bytes, moved
from rewriter.memory.plan import Infeasible
from rewriter.passes.lm_head_loss import lm_head_loss
from tests.golden import trace


def movable(model, *, trained: bool = False) -> dict[str, int]:
    return movable_bytes(program_of(model.requires_grad_(trained)))


def program_of(model) -> Any:
    module, _ = trace(lambda ids: model(ids) * 1, torch.zeros(3, dtype=torch.int64))
    module, _ = apply(lm_head_loss, module)
    return SimpleNamespace(source=module)


def test_a_frozen_embedding_could_leave_the_device_and_a_trained_one_could_not():
    assert movable(torch.nn.Embedding(8, 4)) == {"embedding": 8 * 4 * 4}
    assert movable(torch.nn.Embedding(8, 4), trained=True) == {}


class Head(torch.nn.Module):
    """The embedding, and the loss of a head that is tied to it or not."""

    def __init__(self, tied: bool):
        super().__init__()
        self.rows = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.rows.weight

    def forward(self, input):
        return F.cross_entropy(self.head(self.rows(input)), input)


@pytest.mark.parametrize(("tied", "bytes_of_it"), [(True, 0), (False, 128)])
def test_a_head_that_only_its_loss_reads_could_leave_it_and_needs_no_bytes_of_its_own_if_tied(
    tied, bytes_of_it
):
    assert movable(Head(tied)) == {"embedding": 128, "head": bytes_of_it}
    assert movable(Head(tied), trained=True) == {}


def test_a_weight_that_another_operation_reads_is_needed_there():
    class Tied(torch.nn.Embedding):
        def forward(self, input):
            return F.linear(super().forward(input), self.weight)

    assert movable(Tied(8, 4)) == {}


@pytest.mark.parametrize(
    ("sizes", "at_end", "whose", "least"),
    [
        ({"embedding": 1, "layers": 3}, 8, "embedding's 1.00 GiB and the frozen layers' 3.00 GiB", 4),
        ({"head": 1}, 3, "head's 1.00 GiB", 7),
        ({"head": 1}, 8, "head's 1.00 GiB", 8),
        ({"embedding": 1, "head": 1}, 7.5, "embedding's 1.00 GiB and the frozen head's 1.00 GiB", 6.5),
        ({"embedding": 1, "head": 0}, 8, "embedding's and head's 1.00 GiB", 8),
    ],
)
def test_the_text_says_how_and_the_head_comes_back_for_the_loss(sizes, at_end, whose, least):
    error = Infeasible("", 8 * 2**30, 0, int(at_end * 2**30))
    text = could_live_in_host_memory({kind: size * 2**30 for kind, size in sizes.items()}, (), error, int)
    kinds = tuple(sizes) if len(sizes) > 1 else next(iter(sizes))
    assert f"the frozen {whose} can live" in text
    assert f"after prepare(model, host={kinds!r}), memory_budget={int(least * 2**30)} would do" in text


def test_nothing_is_said_where_nothing_could():
    assert could_live_in_host_memory({}, ("head",), Infeasible("", 8, 0), int) == ""


def test_what_is_in_host_memory_is_named_again_since_prepare_begins_anew():
    error = Infeasible("", 8 * 2**30, 0)
    text = could_live_in_host_memory({"head": 2**30}, ["layers", "embedding"], error, int)
    assert "the frozen head's 1.00 GiB can live in host memory too" in text
    assert "prepare(model, host=('embedding', 'head', 'layers'))" in text


@pytest.mark.parametrize(
    ("host", "could"), [("embedding", ["head"]), ("head", ["embedding"]), (("embedding", "head"), [])]
)
def test_weights_that_prepare_moved_are_told_from_those_that_it_could_move(host, could):
    model: Any = Head(tied=False).requires_grad_(False)
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.rows, lambda: model.head
    prepare(model, host=host)
    program = program_of(model)
    assert moved(program, torch.device("cpu")) == list(checked(host))
    assert list(movable_bytes(program)) == could
