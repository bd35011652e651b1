"""Frozen 4-bit weights that stay dequantised where a budget leaves room: the same steps in less work."""

import gc
import re

import pytest
import torch
from torch._dynamo.source import LocalSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import rewriter
from rewriter.huggingface import prepare
from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.lora_linear import lora_linear
from rewriter.kernels.resident_weight import Form
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.resident_choice import Offer
from rewriter.memory.resident_choice import staying as staying_beside
from rewriter.memory.resident_weights import lasting
from rewriter.memory.shelf import shelf_of
from rewriter.regions.program import Program, Region, RegionCall
from tests.families import build
from tests.memory.budgeted import batches_of, compiled, last_plan, write_other_weights

pytest.importorskip("bitsandbytes")
LAYERS = 3
# With adapters in the bases' own products, whose matrices are in the weights' room.
SETTINGS = {"lora": True, "nf4": True, "double_quant": True, "layers": LAYERS}
BF16 = {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16}
WEIGHTS = 7 * LAYERS


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(**settings):
    model = build("llama", **SETTINGS, **{**BF16, **settings})
    prepare(model)
    return model


def trained(model, lengths=(12, 12), between=lambda: None):
    """Losses and gradients of some steps, each with an update of the adapters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.SGD(trainable, lr=0.1)
    found = []
    for given in batches_of(lengths):
        loss = model(**given).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in trainable)]
        update.step()
        update.zero_grad()
        between()
    return found


def assert_bits(ours, theirs):
    assert len(ours) == len(theirs) > LAYERS
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def staying(plan) -> int:
    return sum(count for _, way, count in plan.ways if "dequantised once" in way)


def changing(budget, between=lambda: None):
    """Steps under a budget, with other weights after each."""
    torch._dynamo.reset()
    model = compiled(model_of(), budget)

    def at_end():
        between()
        write_other_weights(model)

    return trained(model, between=at_end)


@pytest.fixture(scope="module")
def whole():
    """With all of them, how many were made up to the end of each step, and where they were then."""
    made, make, counts, places, sizes = [], Form.made, [], [], []

    def counted(form, packed, matrix):
        made.append(packed.shape)
        return make(form, packed, matrix)

    def between():
        counts.append(len(made))
        sizes.append(shelf_of("cpu").nbytes)
        places.append([kept.whole.data_ptr() for kept in shelf_of("cpu").kept.values()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Form, "made", counted)
        found = changing("1GB", between)
    return found, rewriter.report().graphs[-1], sizes[-1], counts, places


def test_steps_dequantise_nothing_until_a_weight_is_changed(whole):
    *_, counts, places = whole
    # Each once, and one again that was written; there where recordings read it.
    assert counts == [WEIGHTS, WEIGHTS + 1]
    assert places[0] == places[1] and len(set(places[0])) == WEIGHTS


def test_the_report_says_what_stays_and_the_class_is_given_its_weights(whole):
    _, graph, nbytes, *_ = whole
    note = next(note for note in graph.notes if note.startswith("resident"))
    size = f"{nbytes / 2**20:.2f} MiB"
    assert note.startswith(f"resident: {LAYERS} of {LAYERS} layers' weights, {size}, ")
    assert "a step spared" in note and staying(graph.memory) == LAYERS
    assert_golden(next(r for r in graph.program.regions if r.times == LAYERS - 1))


def test_of_a_smaller_budget_fewer_layers_stay_with_the_same_bits_and_go_with_the_model(whole):
    found, graph, nbytes, *_ = whole
    # All but one and a half layers', and what is left to the allocator.
    budget = int((graph.memory.peak - nbytes * 3 // 2 // LAYERS) / 0.94 / (1 - 0.025))
    # Each kind of layer has weights that stay here, or there.
    sizes = []
    assert_bits(changing(budget, lambda: sizes.append(shelf_of("cpu").nbytes)), found)
    assert staying(last_plan()) == 1 and sizes[-1] * LAYERS == nbytes
    # The layers that repeat are of two classes now.
    assert [times for _, _, times in last_plan().ways] == [1] * 5
    assert graph.memory.peak - last_plan().peak == pytest.approx(nbytes * 2 / LAYERS, rel=0.02)
    assert last_plan().seconds > graph.memory.seconds
    # What is compiled is still there.
    gc.collect()
    assert not shelf_of("cpu").kept


def assert_golden(layer):
    """A layer's class is given its weights, and nothing of a packed one."""
    given = re.findall(r"\(%(dequantised_\d+), \((\d+, \d+)\)\)", layer.graph)
    shapes = ["64, 64", "32, 64", "32, 64", "64, 64", "128, 64", "128, 64", "64, 128"]
    assert given == [(f"dequantised_{i}", shape) for i, shape in enumerate(shapes)]
    assert "nf4" not in layer.graph and layer.graph.count("lora_linears](") == 4


def choice(name="keep all", peak=100, seconds=1.0):
    return Choice(name, 10, 0, peak, peak, seconds, 2 * seconds)


def kept(budget, calls=4):
    parts = tuple(Part(str(i), "layer", (choice(),)) for i in range(calls))
    return MemoryPlan(Problem(parts, 1000, budget, 0), tuple(part.choices[0] for part in parts))


def roomy(plan):
    return plan.leaves_room


def test_what_spares_most_a_byte_stays_and_nothing_where_it_is_not_worth_a_compilation():
    plan = kept(2000)
    offers = [Offer(200, 0.1, 0.0), Offer(200, 0.1, 0.1), None, Offer(200, 0.1, 0.1)]
    found = staying_beside(plan, offers, roomy)
    # 1000, four times 10, 100 less 10, of 1880.
    assert found is not None and found.calls == {0, 1, 3} and found.plan.peak == plan.peak + 600
    assert found.plan.seconds == pytest.approx(plan.seconds - found.seconds) and found.seconds == 0.5
    assert found.note(offers).startswith("resident: 3 of 3 layers' weights")
    smaller = staying_beside(kept(1650), offers, roomy)
    assert smaller is not None and smaller.calls == {1, 3}
    assert staying_beside(kept(1300), offers, roomy) is None


def test_less_is_worth_it_where_all_that_could_stay_does_and_no_kind_of_layer_is_compiled_twice():
    plan, little, all_of_it = kept(2000), Offer(200, 0.005, 0.005), [Offer(150, 0.005, 0.005)] * 4
    assert staying_beside(plan, [little] * 4, roomy) is None  # Three of four fit.
    found = staying_beside(plan, all_of_it, roomy)
    assert found is not None and found.calls == {0, 1, 2, 3}
    assert staying_beside(plan, [Offer(150, 0.001, 0.001)] * 4, roomy) is None


def adapted(scale, compute):
    """A region of one wide 4-bit layer whose adapter's B may be computed, and a program that calls it."""
    fake = FakeTensorMode()
    bf16 = {"dtype": torch.bfloat16}
    tensors = {
        "x": torch.empty(4, 64, **bf16),
        "data": torch.empty(512 * 32, 1, dtype=torch.uint8),
        "absmax": torch.empty(512),
        "a": torch.empty(8, 64, **bf16, requires_grad=True),
        "b": torch.empty(512, 8, **bf16, requires_grad=True),
    }
    inputs = {**{name: fake.from_tensor(tensor) for name, tensor in tensors.items()}, "scale": scale}
    graph, source = torch.fx.Graph(), torch.fx.Graph()
    nodes = {name: graph.placeholder(name) for name in inputs}
    given = tuple(source.placeholder(name) for name in inputs)
    source.output(())
    b = nodes["b"]
    if compute:
        b = graph.call_method("mul", (b, 2.0))
        b.meta["example_value"] = inputs["b"] * 2.0
    scaled = (scale,) if isinstance(scale, float) else (nodes["scale"],)
    packed = Packed4bit(nodes["data"], (512, 64), nodes["absmax"], 64, "nf4", None, None, None)
    graph.output((graph.call_function(lora_linear, (nodes["x"], packed, None, nodes["a"], b, *scaled)),))
    region = Region("layer", torch.fx.GraphModule({}, graph), tuple(inputs.values()))
    return Program(torch.fx.GraphModule({}, source), (RegionCall(region, given, ()),)), region


def test_a_weight_whose_adapters_matrix_is_computed_or_scale_a_symbol_is_left():
    assert [weight.matrix for weight in lasting(*adapted(1.5, compute=False))] == [4]
    assert not lasting(*adapted(1.5, compute=True))
    environment, source = ShapeEnv(), LocalSource("scale")
    symbol = environment.create_symbol(1.5, source, DimDynamic.DYNAMIC)
    scale = environment.create_symfloatnode(symbol, hint=1.5, source=source)
    assert not lasting(*adapted(scale, compute=False))
