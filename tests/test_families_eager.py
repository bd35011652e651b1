"""The catalogue of tiny models: each traces to one graph, and the parity harness sees what it should."""

import pytest
import torch

from tests.capture import capture, dump
from tests.families import batch, build
from tests.parity import float64_throughout, parity, true_step


def _compile_kwargs(change=None) -> dict:
    """A backend that runs Dynamo's graph as it is, or after ``change`` has edited it."""

    def backend(graph, example_inputs):
        if change is not None:
            change(graph)
            graph.recompile()
        return graph.forward

    return {"backend": backend}


# Of all the others tests/test_parity.py says that there is one graph.
def test_llama_traces_to_one_graph():
    graphs = capture(build("llama"), **batch())
    assert len(graphs) == 1
    graph, example_inputs = graphs[0]
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(example_inputs)
    assert len(dump(graph).splitlines()) >= len(graph.graph.nodes)


def test_adapters_on_four_bit_weights_trace_to_one_graph():
    model = build("llama", dtype=torch.bfloat16, nf4=True, double_quant=True, lora=True, lora_dropout=0.1)
    graphs = capture(model, **batch())
    assert len(graphs) == 1
    text = dump(graphs[0][0])
    assert "gemm_4bit" in text and "dropout" in text


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt_oss"])
def test_every_parameter_gets_a_gradient_that_is_not_rounding(name):
    gradients = true_step(build(name), batch()).gradients
    model = build(name)
    assert gradients.keys() == {n for n, _ in model.named_parameters()}
    sizes = {n: g.abs().max().item() for n, g in gradients.items()}
    assert min(sizes.values()) > 1e-7, min(sizes, key=sizes.get)


def test_the_truth_is_fp64_throughout_and_eager_is_near_it():
    model = build("gemma3")
    (check,) = parity(model, [batch()], _compile_kwargs()).runs
    assert check.truth.loss.dtype == torch.float64
    assert 0 < max(eager for _, eager in check.distances().values()) < 1e-4


def test_a_narrow_tensor_in_the_truth_is_refused():
    narrow = torch.ones(2)
    with pytest.raises(AssertionError, match="float32"), float64_throughout():
        narrow + 1


@pytest.mark.parametrize(
    "options",
    [
        {"name": "llama_bias"},
        {"name": "qwen3_moe", "dtype": torch.bfloat16, "all_experts": True},
        {"name": "phi3", "dtype": torch.bfloat16, "nf4": True, "lora": True},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_a_graph_left_as_it_was_passes(options):
    parity(build(**options), [batch()], _compile_kwargs()).check()


def test_dropout_is_compared_under_the_same_random_numbers():
    model = build("llama", lora=True, lora_dropout=0.3)
    parity(model, [batch()], {"backend": "aot_eager"}).check()


def _change_epsilon(graph) -> None:
    rsqrt = next(node for node in graph.graph.nodes if node.target is torch.rsqrt)
    add = rsqrt.args[0]
    add.args = (add.args[0], 2e-6)


def _detach_one_weight(graph) -> None:
    linear = next(node for node in graph.graph.nodes if node.target is torch._C._nn.linear)
    with graph.graph.inserting_before(linear):
        linear.update_arg(1, graph.graph.call_method("detach", (linear.args[1],)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(_change_epsilon, "is further from"), (_detach_one_weight, "only one of compiled and eager")],
)
def test_a_wrong_graph_fails(change, complaint):
    with pytest.raises(AssertionError, match=complaint):
        parity(build("llama"), [batch()], _compile_kwargs(change)).check()
