"""What ``rewriter.plan`` foresees: the same for a config, its model and a shortened one; and its errors."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig

import rewriter
from rewriter.foresee.blueprint import Blueprint, blueprint
from rewriter.foresee.like_gpu import LikeGpu
from rewriter.foresee.longest import longest
from rewriter.foresee.packed_linear import PackedLinear
from rewriter.foresee.question import Question
from rewriter.foresee.repetition import shorten
from rewriter.foresee.traced import Untraceable, traced
from rewriter.memory import planner
from rewriter.memory.machine import H200
from rewriter.memory.plan import Choice, Infeasible, Part, Problem
from rewriter.memory.unwrapped import UNWRAPPED
from tests.catalogue import FAMILIES
from tests.families import build

MIB = 2**20


def config(layers: int = 8, family: str = "llama"):
    settings = {
        name: [kinds[i % len(kinds)] for i in range(layers)]
        for name in ("layer_types", "no_rope_layers")
        if (kinds := FAMILIES[family].settings.get(name))
    }
    return FAMILIES[family].configuration(num_hidden_layers=layers, **settings)


def asked(model, rank: int | None = None, quantise: str | None = None) -> Question:
    """A question of one row on an H200; ``problem`` traces."""
    return Question(model, rank, quantise, torch.bfloat16, torch.bfloat16, 1, 2**33, 2**33, H200)


def program_of(made: Blueprint) -> list[tuple]:
    """Of each call its region's operations but casts, and the shapes and dtypes that it is given."""
    return [
        (
            [n.target for n in call.region.module.graph.nodes if n.target != "to"],
            [(x.shape, x.dtype, x.requires_grad) for x in call.region.inputs],
        )
        for call in traced(made, 1, 64, torch.bfloat16).calls
    ]


def test_the_layers_that_are_traced_stand_for_all():
    question = asked(config(5))
    short, _ = question.problem(512)
    assert question.made.left_out and question.made.left_out.times == 2
    question.made = question._make(True)
    (whole, *_), _ = question._problems(512)
    assert question.made.left_out is None
    assert short == whole


def test_layers_that_take_turns_are_left_out_by_turns():
    question = asked(config(12, "gemma2"))
    problem, _ = question.problem(512)
    assert question.made.left_out and question.made.left_out.window == range(2, 4)
    kinds = [part.kind for part in problem.parts]
    assert kinds == ["beginning", *["layer_a", "layer_b"] * 6, "end"]


def test_a_config_and_the_quantised_model_of_it_are_traced_alike():
    model = build("llama", lora=True, nf4=True, double_quant=True, layers=4, dtype=torch.bfloat16)
    before = list(model.named_parameters())
    of_model, of_config = blueprint(model), blueprint(config(4), 4, "nf4")
    assert of_model.weight_bytes == of_config.weight_bytes
    assert of_model.trained_bytes == of_config.trained_bytes
    assert program_of(of_model) == program_of(of_config)
    assert all(a is b for (_, a), (_, b) in zip(before, model.named_parameters(), strict=True))
    assert "_rewriter_preparation" not in vars(model)


def test_a_config_is_left_as_it_was():
    given = config(4)
    before = copy.deepcopy(given.to_dict())
    blueprint(given, lora_rank=4)
    assert given.to_dict() == before and given.use_cache is not None


def test_what_to_compute_again_is_left_to_the_plan():
    model = build("llama", layers=2, dtype=torch.bfloat16)
    assert not blueprint(model).notes
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    made = blueprint(model)
    assert made.notes == (UNWRAPPED,)
    assert model.is_gradient_checkpointing
    assert not any(getattr(m, "gradient_checkpointing", False) for m in made.model.modules())


def test_bytes_of_weights_are_those_of_the_whole_model():
    model = build("llama", layers=8, dtype=torch.bfloat16)
    given = sum(x.nbytes for x in {*model.parameters(), *model.buffers()})
    made = blueprint(config())
    assert made.left_out is not None
    assert made.weight_bytes == made.trained_bytes + sum(x.nbytes for x in model.buffers()) == given


@pytest.mark.parametrize("nested", [False, True])
def test_a_packed_linear_has_the_tensors_that_bitsandbytes_makes(nested):
    bnb = pytest.importorskip("bitsandbytes")
    data, state = bnb.functional.quantize_4bit(
        torch.randn(96, 64), quant_type="nf4", compress_statistics=nested
    )
    tensors = [data, state.absmax] + (
        [state.offset, state.state2.absmax, state.state2.code] if nested else []
    )
    made = PackedLinear(96, 64, None, "nf4", torch.bfloat16, nested)
    assert sorted(x.nbytes for x in made.buffers()) == sorted(x.nbytes for x in tensors)
    assert made.weight.shape == data.shape


@pytest.fixture(scope="module")
def foreseen():
    wide = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    return rewriter.plan(wide, tokens=16384, memory_budget="8GiB", machine="H200")


def test_a_plan_says_what_fits_and_how_fast(foreseen):
    assert foreseen.seconds > 0 and foreseen.tokens_per_second == 16384 / foreseen.seconds
    assert foreseen.peak <= foreseen.plan.problem.device_budget and foreseen.hosted == 0
    text = str(foreseen)
    assert "LlamaForCausalLM" in text and "layer_a × 8: " in text and "of H200" in text
    json.dumps(foreseen.to_dict())
    assert foreseen.picture.startswith("<svg")
    assert {"kind": "end", "way": "keep all", "count": 1} in foreseen.to_dict()["ways"]


def test_a_wide_model_is_planned_tighter_where_memory_is_short(foreseen):
    problem, roomy = foreseen.plan.problem, foreseen.plan
    tight = planner.plan(replace(problem, device_budget=int(roomy.peak * 0.7)))
    assert tuple(foreseen.notes) == () and roomy.hosted == 0
    assert tight.seconds >= roomy.seconds and tight.peak <= 0.7 * roomy.peak
    with pytest.raises(Infeasible, match=r"cannot hold 1 × 16,384 tokens: at least"):
        planner.plan(replace(problem, device_budget=problem.static + MIB))


@pytest.mark.parametrize("threshold", [0, 30_000])
@pytest.mark.parametrize("budget", [10**4, 10**6, 10**8, 10**10])
def test_the_longest_sequence_is_found_by_few_questions(budget, threshold):
    lengths = []

    def problem_at(tokens: int) -> Problem:
        lengths.append(tokens)
        peak = 1000 * tokens + 500 * max(0, tokens - threshold)
        return Problem((Part("x", "x", (Choice("c", 0, 0, peak, 0, 0.0, 0.0),)),), 5000, budget, 0)

    found = longest(problem_at)
    need = 5000 + 1000 * found + 500 * max(0, found - threshold)
    more = int(found * 1.02) + 512
    assert need <= budget or found == 256
    assert 5000 + 1000 * more + 500 * max(0, more - threshold) > budget
    assert len(set(lengths)) <= 8


class Toy(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=kind == "b") for kind in kinds)
        for place, layer in enumerate(self.layers):
            layer.layer_idx = place  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kinds", "window", "times", "kept"),
    [
        ("a" * 8, range(1, 2), 5, "aaa"),
        ("b" + "a" * 8, range(2, 3), 5, "baaa"),
        ("ab" * 5, range(2, 4), 2, "ababab"),
        ("aab" * 5 + "a", range(3, 6), 2, "aabaabaaba"),
        ("a" * 3, None, 0, "aaa"),
        ("abba" + "ab", None, 0, "abbaab"),
    ],
)
def test_what_repeats_is_shortened(kinds, window, times, kept):
    model = Toy(kinds)
    found = shorten(model, "layers")
    assert (found and (found.window, found.times)) == (window and (window, times))
    assert "".join("ab"[layer.bias is not None] for layer in model.layers) == kept


def test_attention_is_traced_as_a_gpu_runs_it():
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            answers.append(x.is_cuda)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            answers.append(grad.is_cuda)
            return grad * 2

    def gradient(q, k):
        q = Asks.apply(q.detach().requires_grad_())
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return torch.autograd.grad([out], [q], [out])

    answers = []
    with FakeTensorMode(), LikeGpu():
        q, k = (torch.empty(1, heads, 64, 32, dtype=torch.bfloat16) for heads in (4, 2))
        code = make_fx(gradient)(q, k).code
        x = torch.empty(3).requires_grad_()
        torch.autograd.grad([Asks.apply(x).sum()], [x], [torch.empty(())])
    assert "_scaled_dot_product_flash_attention_backward" in code
    assert answers == [True, True, True] and not torch.empty(1).is_cuda


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"quantise": "int3"}, "known are 'nf4' and 'fp4'"),
        ({"quantise": "nf4"}, "nothing is trained"),
        ({"host_budget": 0.5}, "a fraction of an unknown amount"),
        ({"memory_budget": "lots"}, "'memory_budget' is 'lots'"),
        ({"machine": "/nowhere/machine.json"}, "'/nowhere/machine.json', neither a known card"),
        ({"machine": "H100"}, r"'H100', neither a known card \(H200, .*\) nor a file, .*mean 'H100 80GB'"),
        ({"machine": "a100"}, "did you mean 'A100 80GB' or 'A100 40GB'?"),
        ({"machine": "RTX4090"}, "did you mean 'RTX 4090'?"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn; give a dtype of weights"),
        ({"tokens": 0}, "tokens is 0; give a whole number above 0, or None"),
        ({"tokens": "200k"}, "tokens is '200k'; give a whole number"),
        ({"rows": None}, r"rows is None; give a whole number above 0\."),
        ({"lora_rank": -3}, "lora_rank is -3; give a whole number"),
        ({"machine": 3}, "'3', neither a known card"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; give a dtype of weights, as torch.bfloat16"),
        ({"autocast": True}, "autocast is True; give torch.bfloat16, torch.float16 or None"),
        ({"host": True}, "host is True; give a name, or several"),
        ({"memory_budget": "24 gigs"}, r"is '24 gigs'; give bytes .*, a size \(\"24GB\""),
    ],
)
def test_malformed_questions_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        rewriter.plan(config(2), **({"tokens": 512, "memory_budget": "1GiB", "machine": "H200"} | arguments))


def test_a_model_that_is_adapted_already_is_not_adapted_again():
    with pytest.raises(ValueError, match="has frozen weights already"):
        rewriter.plan(build("llama", lora=True), tokens=512, memory_budget="1GiB", lora_rank=4)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="Fraction is neither"):
        from fractions import Fraction

        rewriter.plan(Fraction(1), tokens=512, memory_budget="1GiB")


def test_a_module_that_takes_no_labels_is_refused():
    with pytest.raises(Untraceable, match="Linear is no model of tokens and labels"):
        rewriter.plan(nn.Linear(4, 4), tokens=512, memory_budget="1GiB", machine="H200")


def test_a_model_that_breaks_the_graph_is_refused():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, input_ids, labels):
            torch._dynamo.graph_break()
            return self.weight.sum()

    with pytest.raises(Untraceable, match="Breaks does not trace to one graph: "):
        rewriter.plan(Breaks(), tokens=512, memory_budget="1GiB", machine="H200")


@pytest.mark.parametrize("host", ["embedding", ("embedding", "head", "layers")])
def test_weights_in_host_memory_are_not_on_the_device(host):
    on_device, found = (blueprint(config(), 4, "nf4", host=kinds) for kinds in ((), host))
    model = build("llama", lora=True, nf4=True, double_quant=True, layers=8, dtype=torch.bfloat16)
    moved = sum(weight.nbytes for weight in rewriter.prepare(model, host=host).hosted)
    of_model = blueprint(model)
    assert on_device.weight_bytes - found.weight_bytes == sum(found.host.there.values()) == moved
    assert (of_model.weight_bytes, of_model.host) == (found.weight_bytes, found.host)
    assert not on_device.host.there and on_device.host.could.keys() == {"embedding", "head", "layers"}
    assert found.host.read_over_the_bus(100) >= 100 * found.host.row > 0


def test_what_does_not_fit_says_which_weights_could_leave_the_device():
    with pytest.raises(
        Infeasible,
        match=r"head's .* memory too: after prepare\(model, host=\('embedding', 'head', 'layers'\)\), mem",
    ):
        rewriter.plan(
            config(), tokens=512, memory_budget="697MiB", machine="H200", lora_rank=4, quantise="nf4",
            host="embedding",
        )  # fmt: skip


def test_a_card_that_is_too_small_is_told_the_least_that_would_do():
    given = {"tokens": 512, "machine": "H200"}
    with pytest.raises(Infeasible) as refusal:
        rewriter.plan(config(2), memory_budget="40MB", **given)
    error = refusal.value
    assert f"memory_budget={error.least_device} is the least that would do" in str(error)
    assert "0.0 GiB" not in str(error)
    rewriter.plan(config(2), memory_budget=error.least_device, **given)


def _ample(host=()):
    """A plan of 4-bit weights under adapters, with room to spare."""
    return rewriter.plan(
        config(), tokens=32, memory_budget="4GiB", machine="H200", lora_rank=4, quantise="nf4", host=host
    )


@pytest.fixture(scope="module")
def ample():
    return _ample()


@pytest.fixture(scope="module")
def away():
    return _ample(host=("head", "layers"))


def test_the_head_comes_back_for_its_loss_and_takes_the_time_of_the_bus(ample, away):
    there, away = ample.plan, away.plan
    size = 2 * config().vocab_size * config().hidden_size
    # Of 4-bit weights, too.
    assert there.problem.static - away.problem.static > size
    last = len(there.problem.parts) - 1
    ours, theirs = (
        (plan.choices[last].forward_peak, plan.choices[last].backward_peak) for plan in (away, there)
    )
    assert ours == (theirs[0] + size, theirs[1])
    waits = away.choices[last].forward_seconds - there.choices[last].forward_seconds
    assert waits >= size / H200.to_device


def test_beside_layers_in_host_memory_the_head_comes_ahead_however_much_room_there_is(away):
    assert away.plan.leaves_room and away.plan.hidden > 0


def test_weights_that_cannot_leave_the_device_are_refused():
    with pytest.raises(ValueError, match="embedding is trained"):
        blueprint(config(2), host=("embedding",))
    with pytest.raises(ValueError, match="no linear is in 4 bits"):
        blueprint(config(2), 4, host=("layers",))


def test_with_room_to_spare_weights_stay_dequantised_and_count(ample):
    (note,) = (note for note in ample.notes if note.startswith("resident"))
    assert note.startswith("resident: 8 of 8 layers' weights, ") and note in str(ample)
    # Seven in bf16 of each layer, and what of their rooms is zeros.
    weights = 8 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert ample.plan.problem.static > weights
    assert sum("dequantised once" in way for _, way in ample.plan.counts) == 2
