"""Models as programs of regions, in all the ways that they are trained and run."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from rewriter.regions.outline import outline
from rewriter.regions.program import link
from tests.families import batch, build
from tests.golden import trace
from tests.regions.chains import Chain
from tests.regions.outlined import Numbers, assert_equal, numbers, outlined, run_program


def assert_runs_as_the_graph_does(case, order: str) -> None:
    assert case.order == order
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))


def test_keys_and_values_are_results_of_the_layers():
    case = outlined(build("llama", layers=3, use_cache=True), **batch(), lowered=True)
    # The stream is two tensors, itself and its norm; cosines, sines and the empty cache are made once.
    assert [len(call.outputs) for call in case.program.calls] == [5, 4, 4, 4, 2]
    assert_runs_as_the_graph_does(case, "beginning a a a end")


def test_hidden_states_are_results_of_the_layers():
    model = build("llama", layers=4)
    # transformers puts hooks on the layers at the first call, which Dynamo does not trace.
    model(**batch(), output_hidden_states=True)
    case = outlined(model, **batch(), output_hidden_states=True, lowered=True)
    assert case.order == "beginning a a a a end"
    ours, theirs = numbers(run_program(case), case.values), numbers(case.body, case.values)
    assert len(ours.results) >= 6
    assert_equal(Numbers(ours.results, []), Numbers(theirs.results, []))
    # AOTAutograd adds the gradient of a result after the others, eager where it comes.
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_layers_may_be_checkpointed():
    model = build("llama", layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    case = outlined(model, **batch(), lowered=True)
    (layer,) = [r for r in case.program.regions if r.name == "layer_a"]
    assert "tag_activation_checkpoint" in str(layer.module.graph)
    assert_runs_as_the_graph_does(case, "beginning a a a end")


def test_the_embedding_may_be_the_head():
    model = build("llama", layers=3)
    model.lm_head.weight = model.model.embed_tokens.weight
    case = outlined(model, **batch(), lowered=True)
    beginning, *_, end = case.program.calls
    assert set(beginning.inputs) & set(end.inputs)
    assert_runs_as_the_graph_does(case, "beginning a a a end")


def test_adapters_drop_out_as_in_the_graph():
    case = outlined(build("llama", layers=3, lora=True, lora_dropout=0.3), **batch(), lowered=True)
    program = run_program(case)
    first = numbers(program, case.values, seed=1)
    assert_equal(first, numbers(case.body, case.values, seed=1))
    assert_equal(first, numbers(program, case.values, seed=1))
    other = numbers(program, case.values, seed=2)
    assert not torch.equal(first.gradients[0], other.gradients[0])


def test_each_layer_draws_its_own_random_numbers():
    def function(x, weights):
        kept = []
        h = torch.tanh(x)
        for w in weights:
            dropped = F.dropout(torch.ones_like(h) * w, 0.5, True)
            h = h + dropped
            kept.append(dropped)
        return h, *kept

    weights = [torch.ones(64, requires_grad=True) for _ in range(4)]
    case = outlined(function, torch.randn(8, 64, requires_grad=True), weights, lowered=True)
    assert case.order == "beginning a a a a"
    _, *dropped = numbers(run_program(case), case.values).results
    assert not any(torch.equal(a, b) for i, a in enumerate(dropped) for b in dropped[:i])


def test_autocast_may_be_entered_around_the_model():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case = outlined(build("llama", layers=3), **batch(), lowered=True)
        ours = numbers(run_program(case), case.values)
        assert case.order == "beginning a a a end"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = numbers(case.body, case.values)
    assert torch.equal(ours.results[0], theirs.results[0])
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02 * b.abs().max().item())


def test_a_boolean_mask_of_all_layers_is_turned_into_numbers_once():
    chain = Chain((), ("attention", "residual"), 4, ())
    case = outlined(chain, *chain.inputs(), lowered=True)
    made = [n for n in case.program.source.graph.nodes if "additive_mask" in str(n.target)]
    assert len(made) == 1 and made[0] in case.program.calls[0].outputs
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))


def test_no_layer_keeps_a_mask_of_its_own():
    case = outlined(build("mistral", layers=3), **batch(length=12), lowered=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run_program(case)(*case.values)
    assert kept and all(tensor.shape[-2:] != (12, 12) for tensor in kept)
    assert_runs_as_the_graph_does(case, "beginning a a a end")


def test_one_weight_of_all_layers_is_one_input():
    chain = Chain((), ("residual",), 4, (), tied=True)
    case = outlined(chain, *chain.inputs(), lowered=True)
    ours, theirs = numbers(run_program(case), case.values), numbers(case.body, case.values)
    torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-5, atol=1e-6)


def test_whole_numbers_have_no_gradients():
    def function(x, keys):
        for key in keys:
            x = torch.bitwise_xor(x * 3 + 1, key) // 2
        return x

    keys = [torch.randint(0, 100, (5,)) for _ in range(6)]
    case = outlined(function, torch.randint(0, 100, (5,)), keys, lowered=True)
    assert case.program is not None
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))


def test_a_result_that_is_also_an_input_or_twice_a_result_stays_so():
    def function(x, weights):
        h = torch.tanh(x)
        for w in weights:
            h = h + torch.sin(h @ w)
        return h, x, h, {"last": h * 2}

    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(4)]
    case = outlined(function, torch.randn(3, 4, requires_grad=True), weights, lowered=True)
    results = run_program(case)(*case.values)
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))
    assert len(results) >= 2


@pytest.mark.parametrize("evaluate", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_program_is_compiled_and_run_in_any_grad_mode(evaluate):
    chain = Chain((), ("norm", "without_grad", "residual"), 4, ())
    inputs = chain.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="rewriter", options={"lowering": "eager"})
    with evaluate():
        ours, theirs = compiled(*inputs)[0], chain(*inputs)[0]
    assert ours.requires_grad == theirs.requires_grad
    torch.testing.assert_close(ours, theirs)


def test_a_graph_may_use_the_names_of_regions():
    chain = Chain((), ("residual",), 4, ("norm",))
    module, examples = trace(chain, *chain.inputs())
    for node, name in zip(module.graph.nodes, ("beginning", "end", "layer_a", "layer_b"), strict=False):
        node._rename(name)
    module.recompile()
    program = outline(module, examples)
    assert program is not None
    assert [r.name for r in program.regions] == ["beginning_region", "layer_a_region", "end_region"]
    linked = link(program, {region: region.module for region in program.regions})
    assert_equal(numbers(linked, examples), numbers(module, examples))
