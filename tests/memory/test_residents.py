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
from rewriter.memory.residents import Residents, Shelf, Wanted, shelf_of
from rewriter.regions.program import Program, Region, RegionCall
from tests.families import build
from tests.memory.budgeted import batches_of, compiled, last_plan

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


def change(model):
    """Write other weights in the place of some, as who loads a checkpoint does."""
    weight = next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.base_layer" in n)
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def changing(budget, between=lambda: None):
    """Steps under a budget, with other weights after each."""
    torch._dynamo.reset()
    model = compiled(model_of(), budget)

    def at_end():
        between()
        change(model)

    return trained(model, between=at_end)


@pytest.fixture(scope="module")
def whole():
    """With all of them, how many were made up to the end of each step, and where they were then."""
    made, make, counts, places = [], Form.made, [], []

    def counted(form, packed, matrix):
        made.append(packed.shape)
        return make(form, packed, matrix)

    def between():
        counts.append(len(made))
        places.append([kept.whole.data_ptr() for kept in shelf_of("cpu").kept.values()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Form, "made", counted)
        found = changing("1GB", between)
    return found, rewriter.report().graphs[-1], shelf_of("cpu").nbytes, counts, places


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


def test_of_a_smaller_budget_fewer_layers_stay_with_the_same_bits_and_go_with_the_program(whole):
    found, graph, nbytes, *_ = whole
    # All but one and a half layers', and what is left to the allocator.
    budget = int((graph.memory.peak - nbytes * 3 // 2 // LAYERS) / 0.94 / (1 - 0.025))
    # Each kind of layer has weights that stay here, or there.
    assert_bits(changing(budget), found)
    assert staying(last_plan()) == 1 and shelf_of("cpu").nbytes * LAYERS == nbytes
    # The layers that repeat are of two classes now.
    assert [times for _, _, times in last_plan().ways] == [1] * 5
    assert graph.memory.peak - last_plan().peak == pytest.approx(nbytes * 2 / LAYERS, rel=0.02)
    assert last_plan().seconds > graph.memory.seconds
    torch._dynamo.reset()
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
    assert staying_beside(plan, [Offer(200, 0.005, 0.005)] * 4, roomy) is None


class Doubled:
    """A weight whose dequantisation is twice its numbers."""

    def __init__(self, form):
        self.form = form

    def packed(self, inputs):
        return inputs[0]


def made(form, packed, matrix):
    whole = packed.new_zeros(form.shape(tuple(packed.shape)))
    whole[: packed.shape[0], : packed.shape[1]] = 2 * packed
    if matrix is not None:
        form.place(whole).copy_(matrix)
    return whole


@pytest.fixture
def doubled(monkeypatch):
    monkeypatch.setattr(Form, "made", made)
    return Doubled(Form(torch.float32))


@pytest.fixture
def beside(doubled):
    """With room for an adapter's matrix."""
    return Doubled(Form(torch.float32, dim=1, room=4, rank=2, scale=2.0))


def test_one_program_has_them_at_a_time_and_hands_over_what_another_wants(doubled):
    shelf, inputs = Shelf(), [torch.ones(8, 4), torch.ones(4, 4), torch.ones(2, 4)]
    first = Residents([Wanted(doubled, (0,), None), Wanted(doubled, (1,), None)], shelf)
    second = Residents([Wanted(doubled, (1,), None), Wanted(doubled, (2,), None)], shelf)
    (_, shared), (turn, read) = first.given(inputs), first.settle(inputs)
    assert first.settle(inputs)[0] == turn and read[1] is shared
    again, _ = second.given(inputs)
    # A recording of the first would read what is gone.
    assert again is shared and shelf.nbytes == (4 + 2) * 4 * 4 and first.settle(inputs)[0] > turn
    Residents([], shelf, room=shelf.nbytes).given(inputs)
    assert shelf.nbytes == (8 + 4) * 4 * 4
    Residents([], shelf, room=shelf.nbytes - 1).given(inputs)
    assert not shelf.kept
    first.given(inputs)
    del first
    assert not shelf.kept


def test_a_change_of_a_weight_is_seen_and_a_backward_that_waits_for_the_old_one_refused(doubled):
    shelf, weight = Shelf(), torch.ones(2, 2)
    one = Residents([Wanted(doubled, (0,), None)], shelf)
    x = torch.ones(2, 2, requires_grad=True)
    loss = (x @ one.given([weight])[0]).sum()
    one.given([weight])
    weight.add_(1)
    assert one.given([weight])[0].eq(4).all() and shelf.turn == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert one.given([torch.full((2, 2), 3.0)])[0].eq(6).all()


def test_two_adapters_of_one_weight_do_not_write_over_each_other(beside):
    shelf, weight = Shelf(), torch.ones(3, 5)
    first, second = (torch.full((3, 2), value, requires_grad=True) for value in (1.0, 3.0))
    both = Residents([Wanted(beside, (0,), 1), Wanted(beside, (0,), 2)], shelf)
    wholes = both.given([weight, first, second])
    assert [whole[0, 5].item() for whole in wholes] == [2, 6]
    # As two programs, one forward before the other's backward.
    one, other = (Residents([Wanted(beside, (0,), 1)], shelf) for _ in range(2))
    x = torch.ones(2, 9, requires_grad=True)
    loss = (x @ one.given([weight, first])[0].t()).sum()
    (x @ other.given([weight, second])[0].t()).sum().backward()
    x.grad = None
    loss.backward()
    assert x.grad[0].tolist() == [6.0] * 7 + [0.0] * 2


def test_a_matrix_given_as_another_tensor_of_its_memory_is_no_change_and_a_written_one_is(beside):
    shelf, weight, matrix = Shelf(), torch.ones(3, 5), torch.ones(3, 2, requires_grad=True)
    one = Residents([Wanted(beside, (0,), 1)], shelf)
    (whole,) = one.given([weight, matrix])
    version = whole._version
    # So does who records a program.
    one.given([weight, matrix.detach().requires_grad_()])
    assert whole._version == version
    with torch.no_grad():
        matrix.mul_(4)
    assert one.given([weight, matrix])[0] is whole and whole[0, 5] == 8 and whole._version > version


def test_a_weight_of_another_shape_where_one_was_is_made_anew(doubled):
    shelf, memory = Shelf(), torch.ones(48)
    one, other = (Residents([Wanted(doubled, (0,), None)], shelf) for _ in range(2))
    one.given([memory.view(8, 6)])
    turn = shelf.turn
    assert other.given([memory.view(6, 8)])[0].shape == (6, 8) and shelf.turn == turn + 1


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
