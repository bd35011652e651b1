"""A fused norm at a layer's end is parted where it crosses to the next layer, and only there."""

import torch

from rewriter.backend import rewrite_graph
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.unwrapped import without_checkpoints
from rewriter.nested import checkpoint_body
from rewriter.options import Options
from rewriter.regions.outline import outline
from rewriter.report import GraphRecord
from tests.capture import capture
from tests.families import batch, build


def _programs(model) -> list:
    """The program of each graph that has layers, and the graph's inputs."""
    found = []
    for graph, inputs in capture(model, **batch()):
        rewritten = rewrite_graph(graph, Options(), GraphRecord("test"))[-1].module
        found.append((outline(rewritten, inputs), inputs))
    return [(program, inputs) for program, inputs in found if program is not None]


def _program(model):
    ((program, inputs),) = _programs(model)
    return program, inputs


def _count(module, target) -> int:
    return sum(n.target is target for n in module.graph.nodes)


def test_one_hidden_state_crosses_a_border_instead_of_two():
    program, inputs = _program(build("llama", layers=3))
    parted = parted_at_borders(program)
    assert parted is not None
    # Inside a layer the sum and the norm stay one.
    assert _count(program.source, add_rms_norm) == _count(parted, add_rms_norm) + _count(parted, rms_norm) - 1
    assert _count(parted, add_rms_norm) >= 3
    again = outline(parted, inputs)
    crossing = [max(len(call.outputs) for call in p.calls[1:-1]) for p in (program, again)]
    assert crossing == [2, 1]
    assert _count(program.source, rms_norm) == 1, "the program itself is left as it was"


def test_parted_and_fused_norms_give_the_same_numbers():
    program, inputs = _program(build("llama", layers=3))
    torch.manual_seed(0)
    values = [
        torch.randn(x.shape) if x.is_floating_point() else torch.ones(x.shape, dtype=x.dtype) for x in inputs
    ]
    results = [module(*values)[0] for module in (program.source, parted_at_borders(program))]
    torch.testing.assert_close(*results)


def test_a_program_without_such_norms_is_left_alone():
    program, _ = _program(build("olmo2", layers=3))
    assert parted_at_borders(program) is None


def test_checkpoints_are_unwrapped_with_all_that_is_in_them():
    model = build("llama", layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    program, inputs = _program(model)
    assert any(checkpoint_body(n) for n in program.source.graph.nodes)
    flat = without_checkpoints(program)
    assert flat is not None and not any(checkpoint_body(n) for n in flat.graph.nodes)
    flat.graph.lint()
    assert any(checkpoint_body(n) for n in program.source.graph.nodes), "the program itself is left as it was"
    assert without_checkpoints(outline(flat, inputs)) is None
