"""Which graphs are proven to bear padding, and why others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rewriter.fusion import apply_all
from rewriter.passes.dropout import dropout_pass
from rewriter.replay.padding import CutOutput, PaddedInput, read, separate_labels
from tests.capture import capture
from tests.families import batch, build


class Tokens(nn.Module):
    """Embedding, then ``body``, in a graph whose length varies."""

    def __init__(self, body):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.positions = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 50)
        self.body = body

    def forward(self, ids):
        return self.body(self, self.table(ids), ids)


def reading_of(body, *, lengths=(12, 17), passes=()):
    """What is known of the graph of ``body`` at a symbolic length, as ``passes`` leave it."""
    torch.manual_seed(0)
    model = Tokens(body)
    graphs = []

    def record(graph, example_inputs):
        graphs.append((graph, example_inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=record)
    for length in lengths:
        compiled(torch.randint(50, (2, length)))
    module, examples = graphs[-1]
    module = apply_all(passes, module).module
    module, examples, doubled = separate_labels(module, examples)
    return read(module, doubled)


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        (lambda m, x, ids: m.head(F.silu(x) * 2.0), CutOutput(0, 1, 0)),
        (lambda m, x, ids: m.head(x)[:, :-1], CutOutput(0, 1, -1)),
        (lambda m, x, ids: m.head(x)[:, 1:].float(), CutOutput(0, 1, -1)),
        (lambda m, x, ids: m.head(x).transpose(1, 2), CutOutput(0, 2, 0)),
        (lambda m, x, ids: x.reshape(-1, 8).tanh().view(2, -1, 8), CutOutput(0, 1, 0)),
        (lambda m, x, ids: F.softmax(x, dim=-1).mean(-1, keepdim=True), CutOutput(0, 1, 0)),
        (lambda m, x, ids: x.cumsum(1), CutOutput(0, 1, 0)),
        (lambda m, x, ids: x.reshape(-1, 8).cumsum(1).view(2, -1, 8), CutOutput(0, 1, 0)),
        (lambda m, x, ids: torch.sort(x, dim=-1)[0] + m.head.bias[:8].expand_as(x), CutOutput(0, 1, 0)),
        (lambda m, x, ids: x - x[:, :1] + x[:, 0, None], CutOutput(0, 1, 0)),
        (lambda m, x, ids: ids.diff(dim=1, prepend=ids[:, :1] - 1) != 1, CutOutput(0, 1, 0)),
        (
            lambda m, x, ids: checkpoint(lambda h: m.head(h.tanh()), x, use_reentrant=False),
            CutOutput(0, 1, 0),
        ),
        (lambda m, x, ids: torch.cat((x, -x), dim=-1).chunk(2, dim=-1)[1], CutOutput(0, 1, 0)),
        (lambda m, x, ids: m.table(ids[:, 1:]) + x[:, 1:], CutOutput(0, 1, -1)),
        (
            lambda m, x, ids: F.scaled_dot_product_attention(
                *(x.view(2, -1, 2, 4).transpose(1, 2),) * 3, is_causal=True
            ),
            CutOutput(0, 2, 0),
        ),
    ],
)
def test_what_treats_tokens_one_by_one_or_sees_earlier_ones_alone_is_padded(body, cut):
    reading = reading_of(body)
    assert reading.unknown is None and reading.unpaddable is None
    assert reading.padding is not None
    assert reading.padding.inputs == (PaddedInput(reading.padding.inputs[0].position, None),)
    assert reading.padding.outputs == (cut,)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x, ids: x.mean(1), "works along the sequence"),
        (lambda m, x, ids: x.sum(), "works along all dimensions"),
        (lambda m, x, ids: x[:, -1], "takes single tokens"),
        (lambda m, x, ids: x[:, ::2], "takes single tokens"),
        (lambda m, x, ids: x[:, -3:], "takes tokens from the end"),
        (lambda m, x, ids: x / x.shape[1], "computes with the length"),
        (lambda m, x, ids: x.reshape(-1, 8).cumsum(0).view(2, -1, 8), "runs over the tokens of several rows"),
        (lambda m, x, ids: x.reshape(-1, 8), "several rows on one axis"),
        (lambda m, x, ids: x.transpose(1, 2) @ x, "multiplies tokens by tokens"),
        (lambda m, x, ids: checkpoint(lambda h: h.sum(1), x, use_reentrant=False), "along the sequence"),
        (lambda m, x, ids: F.softmax(x, dim=1), "works along the sequence"),
        (lambda m, x, ids: torch.cat((x, x), dim=1), "joins sequences"),
        (lambda m, x, ids: F.pad(x, (0, 0, 0, 1)), "appends to the tokens"),
        (lambda m, x, ids: x + m.positions(torch.arange(ids.shape[1])), "indices of padding"),
        (
            lambda m, x, ids: F.scaled_dot_product_attention(*(x.view(2, -1, 2, 4).transpose(1, 2),) * 3),
            "is not proven to be causal",
        ),
    ],
)
def test_what_mixes_tokens_is_not_padded_and_says_why(body, reason):
    reading = reading_of(body)
    assert reading.unknown is None and reading.padding is None
    assert reason in reading.unpaddable


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x, ids: torch.fft.fft(x).real, "fft_fft, is not known"),
        (lambda m, x, ids: x.mul_(2.0), "writes in place"),
        (lambda m, x, ids: x + torch.rand_like(x), "rand_like, is not known"),
    ],
)
def test_of_an_operation_without_a_rule_nothing_is_known(body, reason):
    assert reason in reading_of(body).unknown


def test_dropout_is_padded_and_known_to_draw():
    reading = reading_of(lambda m, x, ids: m.head(F.dropout(x, 0.1)))
    assert reading.padding is not None and reading.draws
    assert not reading_of(lambda m, x, ids: m.head(F.dropout(x, 0.0))).draws


def test_dropout_by_position_is_padded_and_known_to_draw():
    reading = reading_of(lambda m, x, ids: m.head(F.dropout(x, 0.1)), passes=[dropout_pass])
    assert reading.padding is not None and reading.draws


def test_a_fixed_length_is_not_padded():
    reading = reading_of(lambda m, x, ids: m.head(x), lengths=(12,))
    assert reading.padding is None and reading.unpaddable is None and reading.unknown is None


def test_the_graph_and_its_inputs_stay_as_they_were():
    ids = batch()["input_ids"]
    (module, examples), *_ = capture(build("llama", lora=True), input_ids=ids, labels=ids)
    before = str(module.graph)
    separate_labels(module, examples)
    assert str(module.graph) == before
