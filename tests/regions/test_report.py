"""The program for people: what a report says of the regions."""

import json

import pytest
import torch

import rewriter
from rewriter.huggingface import prepare
from rewriter.regions.describe import describe
from tests.families import batch, build
from tests.positional import dropout_by_position
from tests.regions.chains import Chain, each_layer_writes, inputs_of_writers
from tests.regions.outlined import outlined


def _report(function, *args, lowering: str = "eager", **kwargs):
    torch._dynamo.reset()
    with rewriter.inspect() as report:
        torch.compile(function, backend="rewriter", options={"lowering": lowering})(*args, **kwargs)
    return report


@pytest.fixture(scope="module")
def llama():
    return _report(build("llama", layers=3), **batch())


def test_the_program_reads_as_code(llama):
    lines = str(llama.program).splitlines()
    assert lines[0] == "def program(inputs, weights):"
    assert [line.split(" = ")[1].split("(")[0] for line in lines[1:-1]] == [
        "beginning",
        "layer_a",
        "layer_a",
        "layer_a",
        "end",
    ]
    # A layer's last norm is the next layer's first.
    assert lines[3].endswith("weights.model_layers_1[8], weights.model_layers_2)")
    assert all(len(line) < 200 for line in lines)
    compile(str(llama.program), "program", "exec")


def test_a_region_counts_its_operations_and_weights(llama):
    layer = llama.program["layer_a"]
    assert layer.times == 3
    # q, k, v, o, gate, up, down and two norms: hidden 64, intermediate 128, two of four heads for keys.
    assert layer.weights == 9
    assert layer.weight_bytes == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    calls = [line for line in layer.graph.splitlines() if "call_" in line]
    assert layer.operations == len(calls) > 20


def test_all_weights_are_somewhere(llama):
    read = sum(region.times * region.weights for region in llama.program.regions)
    # The rotary frequencies are a buffer, and read, too.
    assert read == len(list(build("llama", layers=3).parameters())) + 1


def test_a_region_that_is_not_there_is_an_error_that_names_those_that_are(llama):
    with pytest.raises(KeyError, match="beginning, layer_a, end"):
        llama.program["layer_z"]


def test_a_report_with_a_program_is_json(llama):
    found = json.loads(json.dumps(llama.to_dict()))
    (graph,) = found["graphs"]
    assert [r["name"] for r in graph["program"]["regions"]] == ["beginning", "layer_a", "end"]


def test_the_text_has_each_regions_operations_weights_and_their_size(llama):
    layer = llama.program["layer_a"]
    row = next(line for line in str(llama).splitlines() if "layer_a" in line)
    assert row.split() == ["layer_a", "×", "3", str(layer.operations), "9", "0.1"]


def test_weights_of_a_prepared_model_are_weights():
    # Not all of them are parameters of the layers that Dynamo sees, and none stands in the code by itself.
    model = build("llama", layers=3, lora=True)
    prepare(model)
    program = outlined(model, **batch()).program
    assert program is not None
    read = describe(program)
    # Of seven linears the weight and two adapters; two norms.
    assert [region.weights for region in read.regions[1:-1]] == [7 * 3 + 2] * 2
    assert "layers_0_" not in read.code and "dict" not in read.code


def test_a_refusal_is_noted_with_its_reason():
    report = _report(each_layer_writes, *inputs_of_writers())
    (note,) = report.graphs[0].notes
    assert note.startswith("compiled as one region: `mul_") and "writes in place" in note
    assert report.program is None


def test_a_graph_without_repetition_is_one_region_without_a_note():
    report = _report(lambda x: torch.tanh(x).sum(), torch.randn(3))
    assert report.graphs[0].notes == [] and report.program is None


def test_inductor_compiles_each_kind_once_and_computes_the_same():
    chain = Chain((), ("attention", "dropout"), 3, ("norm",))
    inputs = chain.inputs()
    torch._dynamo.reset()
    with rewriter.inspect() as report:
        compiled = torch.compile(chain, backend="rewriter")
        torch.manual_seed(3)
        ours = compiled(*inputs)[0]
        ours.backward()
    gradients = [inputs[0].grad.clone(), *(w.grad.clone() for w in inputs[3])]
    for leaf in (inputs[0], *inputs[3]):
        leaf.grad = None
    torch.manual_seed(3)
    with dropout_by_position():
        theirs = chain(*inputs)[0]
    theirs.backward()
    assert max(region.times for region in report.program.regions) >= 2
    torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gradients, [inputs[0].grad, *(w.grad for w in inputs[3])], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
