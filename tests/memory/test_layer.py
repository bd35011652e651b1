"""A layer in stages gives its own gradients, whatever is kept, offloaded, recomputed or tiled."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule

from rewriter.memory.stage_graphs import Unstaged
from tests.memory.decoder import decoder, randn
from tests.memory.small_layers import (
    Piece,
    SmallLayer,
    every_fate,
    new_transfers,
    scheduled,
)

TILES = (1, 5, 12, 14)
SAVING = {"h": "offload", "q": "recompute", "k": "recompute", "v": "recompute", "out": "offload"}


def _step(function, layer, tangents=None):
    """Results, and gradients by name of the input."""
    results = function(*layer.inputs.values())
    roots = [r for r in results if r.requires_grad]
    tangents = _tangents(results) if tangents is None else tangents
    wanted = {n: x for n, x in layer.inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found = torch.autograd.grad(roots, list(wanted.values()), tangents, allow_unused=True)
    return results, dict(zip(wanted, found, strict=True))


def _tangents(results):
    return [randn(*r.shape, dtype=r.dtype, seed=9) for r in results if r.requires_grad]


def _whole(layer):
    return _step(lambda *inputs: layer.eager(inputs), layer)


def _assert_same(ours, eager, *, exact=True):
    (results, gradients), (expected, truths) = ours, eager
    for result, whole in zip(results, expected, strict=True):
        _assert_near(result, whole, exact, "a result")
    assert gradients.keys() == truths.keys()
    for name, truth in truths.items():
        gradient = gradients[name]
        if truth is None:
            assert gradient is None, name
            continue
        assert gradient.shape == truth.shape and gradient.dtype == truth.dtype, name
        # The order of the sum into an input's gradient is the stages': it can round differently.
        _assert_near(gradient, truth, exact and name not in ("h", "x"), name)


def _assert_near(ours, whole, exact, name):
    if exact:
        assert torch.equal(ours, whole), name
    atol = 8 * torch.finfo(whole.dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(ours, whole, rtol=0, atol=atol, msg=name)


# Each two of the three settings in every combination.
@pytest.mark.parametrize(
    ("dtype", "trained", "saving"),
    [
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
    ],
)
def test_gradients_are_the_same_bit_for_bit_under_every_fate(dtype, trained, saving):
    layer = decoder(rows=2, dtype=dtype, trained=trained, saving=saving)
    eager = _whole(layer)
    transfers = new_transfers()
    for fates in every_fate(layer):
        ours = _step(scheduled(layer, fates, transfers=transfers), layer)
        _assert_same(ours, eager)
    assert transfers.arena.in_use == 0 and transfers.stats.bytes_in == transfers.stats.bytes_out > 0


@pytest.mark.parametrize(
    ("rows", "dtype", "saving"),
    [
        (1, torch.float32, True),
        (1, torch.bfloat16, False),
        (2, torch.float32, False),
        (2, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("tile", TILES)
def test_gradients_are_the_same_in_tiles_of_any_length(tile, rows, dtype, saving):
    layer = decoder(rows=rows, dtype=dtype, saving=saving)
    eager = _whole(layer)
    for fates in ({}, SAVING, dict.fromkeys(("q", "k", "v", "out"), "recompute")):
        ours = _step(scheduled(layer, fates, tile), layer)
        _assert_same(ours, eager, exact=tile >= 13)


@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_leaves_in_tiles_gives_the_same_gradients_as_what_leaves_whole(tile, trained):
    layer = decoder(rows=2, dtype=torch.bfloat16, trained=trained, saving=True)
    transfers = new_transfers()
    for fates in every_fate(layer):
        whole = scheduled(layer, fates, tile, transfers=transfers)
        tiles = layer.graphs.saved_in_tiles.intersection(whole.schedule.offloaded)
        expected = _step(whole, layer)
        moved = transfers.stats.bytes_out
        for window in (0, 1000, 1 << 20):
            parted = dataclasses.replace(whole, in_tiles=tiles, window=window)
            _assert_same(_step(parted, layer), expected)
        assert transfers.arena.in_use == 0
        if tiles:
            assert transfers.stats.bytes_out > moved


def test_what_leaves_in_tiles_comes_back_in_the_order_in_which_it_is_read():
    layer = decoder(saving=True)
    fates = {n: "offload" for g in layer.graphs.wiring.gives for n in g} | {"h": "offload"}
    made = scheduled(layer, fates, 5)
    function = dataclasses.replace(made, in_tiles=layer.graphs.saved_in_tiles, window=1 << 20)
    transfers, asked = function.transfers(), []
    _, _, tickets = function.forward(tuple(layer.inputs.values()), transfers)
    expected = [id(ticket) for ticket in function.in_order_of_need(tickets)]
    results = function(*layer.inputs.values())
    reload = transfers.reload
    transfers.reload = lambda ticket: asked.append(ticket._copy.layout.nbytes) or reload(ticket)
    order = [ticket._copy.layout.nbytes for ticket in function.in_order_of_need(tickets)]
    results[0].sum().backward()
    assert len(expected) == len(set(expected)) == len(asked) and asked == order


def test_gradients_of_weights_are_summed_over_tiles_in_fp32():
    layer = decoder(tokens=256, dtype=torch.bfloat16)
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in layer.inputs.items()}
    wide = SmallLayer(layer.pieces, exact, layer.outputs, layer.shared)
    _, truth = _step(lambda *inputs: wide.eager(inputs), wide, [t.double() for t in _tangents(layer.eager())])
    _, whole = _whole(layer)
    _, tiled = _step(scheduled(layer, SAVING, 4), layer)
    for name in ("wq", "gate", "down", "norm"):
        errors = [(found[name] - truth[name]).norm() for found in (tiled, whole)]
        # Each of 64 tiles' products rounds once, and the sum of all once more.
        assert errors[0] <= 2 * errors[1], name


@pytest.mark.parametrize("tile", [None, 5])
def test_a_gradient_that_somebody_else_holds_is_not_written(tile):
    layer = decoder(trained=False)
    eager = _whole(layer)
    for fates in every_fate(layer):
        function = scheduled(layer, fates, tile, owns_gradient=False)
        (result,) = function(*layer.inputs.values())
        tangents = _tangents((result,))
        held = [t.clone() for t in tangents]
        ours = _step(function, layer, tangents)
        _assert_same(ours, eager, exact=tile is None)
        assert torch.equal(tangents[0], held[0])


def test_a_gradient_of_its_own_gives_its_memory_to_the_next():
    layer = decoder(trained=False)
    for owns in (True, False):
        function = scheduled(layer, SAVING, 5, owns_gradient=owns)
        (result,) = function(*layer.inputs.values())
        given = _tangents((result,))[0]
        place = given.data_ptr()
        _, gradients = _step(function, layer, [given])
        assert (gradients["h"].data_ptr() == place) == owns


def test_a_hidden_state_that_two_layers_read_gets_both_gradients():
    layer = decoder(trained=False)
    h, *rest = layer.inputs.values()
    first = scheduled(layer, SAVING, 5, owns_gradient=False)
    second, third = (scheduled(layer, SAVING, 5) for _ in range(2))

    def model(a, b, c):
        (middle,) = a(h, *rest)
        seen = []
        middle.register_hook(lambda g: seen.append(g.clone()))
        kept = middle.register_hook(lambda g: g * 1.0)
        loss = (b(middle, *rest)[0].square() + c(middle, *rest)[0].sin() + middle).sum()
        (gradient,) = torch.autograd.grad(loss, [h])
        kept.remove()
        return loss, gradient, seen[0]

    ours = model(first, second, third)
    eager = model(*[lambda *inputs: layer.eager(inputs)] * 3)
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_many_layers_one_after_the_other():
    layer = decoder(trained=True)
    transfers = new_transfers()
    plans = ({}, SAVING, {"h": "offload"}, dict.fromkeys(("q", "k", "v", "out"), "recompute"))
    layers = [scheduled(layer, fates, 5, transfers=transfers) for fates in plans]

    def stack(functions):
        def run(h, *rest):
            for function in functions:
                (h,) = function(h, *rest)
            return (h,)

        return run

    ours = _step(stack(layers), layer)
    eager = _step(stack([lambda *inputs: layer.eager(inputs)] * len(plans)), layer)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-4)
    assert transfers.arena.in_use == 0


def test_a_second_backward_is_refused_with_the_way_out():
    layer = decoder(trained=False)
    (result,) = scheduled(layer, SAVING)(*layer.inputs.values())
    result.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True needs a run without memory_budget"):
        result.sum().backward()


def test_a_second_derivative_is_refused():
    layer = decoder(trained=False)
    (result,) = scheduled(layer, SAVING)(*layer.inputs.values())
    with pytest.raises(RuntimeError, match="create_graph=True .* second derivatives need"):
        torch.autograd.grad(result.sum(), [layer.inputs["h"]], create_graph=True)


@pytest.mark.parametrize("tile", [None, 5])
def test_without_gradients_nothing_is_kept_or_sent(tile):
    layer = decoder()
    transfers = new_transfers()
    function = scheduled(layer, SAVING, tile, transfers=transfers)
    with torch.no_grad():
        (result,) = function(*layer.inputs.values())
    _assert_near(result, layer.eager()[0], tile is None, "result")
    assert not result.requires_grad
    frozen = [x.detach() if isinstance(x, torch.Tensor) else x for x in layer.inputs.values()]
    (result,) = function(*frozen)
    assert not result.requires_grad
    assert transfers.stats.bytes_out == 0


class _Stumbling:
    """A graph's function that raises when it is called for the ``at``-th time."""

    def __init__(self, function, at):
        self.function, self.left = function, at

    def __call__(self, *values):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.function(*values)


@pytest.mark.parametrize("graph", range(6))
@pytest.mark.parametrize("tile", [None, 5])
def test_an_exception_in_mid_step_leaves_nothing_behind(graph, tile):
    layer = decoder()
    transfers = new_transfers()
    made = []

    def stumble(module, inputs, mode):
        made.append(None)
        second = 2 if tile is not None and len(made) - 1 in (0, 1, 4, 5) else 1
        return _Stumbling(module.forward, second) if len(made) - 1 == graph else module.forward

    stages = layer.graphs.compiled(stumble)
    fates = {"h": "offload", "q": "offload", "k": "offload", "v": "offload", "out": "offload"}
    before, function = (scheduled(layer, fates, tile, stages=s, transfers=transfers) for s in (None, stages))

    def both(h, *rest):
        return function(*before(h, *rest), *rest)

    with pytest.raises(KeyboardInterrupt):
        _step(both, layer)
    ours = _step(both, layer)
    eager = _step(lambda h, *rest: layer.eager((*layer.eager((h, *rest)), *rest)), layer)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-4)
    assert transfers.arena.in_use == 0


def test_a_backward_whose_weights_were_written_since_gives_back_what_was_sent_though_its_error_is_kept():
    layer = decoder()
    transfers = new_transfers()
    h, *rest = (x.clone() if isinstance(x, torch.Tensor) else x for x in layer.inputs.values())
    result = h
    for _ in range(2):
        (result,) = scheduled(layer, SAVING, transfers=transfers)(result, *rest)
    assert transfers.arena.in_use
    with torch.no_grad():
        rest[list(layer.inputs).index("wq") - 1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as ended:
        result.sum().backward()
    assert transfers.arena.in_use == 0 and ended.value


def test_a_forward_without_a_backward_gives_its_host_memory_back():
    layer = decoder()
    transfers = new_transfers()
    function = scheduled(layer, SAVING, transfers=transfers)
    for _ in range(3):
        function(*layer.inputs.values())
    held = transfers.arena.in_use
    for _ in range(5):
        function(*layer.inputs.values())
    assert transfers.arena.in_use == held


def _two_stages(first, second, inputs, takes, *, gives=("a",), outputs=("y",), rows=None, shared=()):
    pieces = (Piece(first, takes[0], gives, rows or {}), Piece(second, takes[1], ("y",), rows or {}))
    return SmallLayer(pieces, inputs, outputs, frozenset(shared))


def test_a_result_that_its_own_backward_reads_holds_no_cycle():
    rows, whole = Piece(lambda x: (x * 2,), ("x",), ("a",), {"x": 1, "a": 1}), Piece(_exp, ("a",), ("y",), {})
    layer = SmallLayer((rows, whole), {"x": randn(2, 6, 4, grad=True)}, ("y",), frozenset())
    function = scheduled(layer, {})
    assert "y" in function.schedule.kept
    (result,) = function(*layer.inputs.values())
    gone = weakref.ref(result)
    gc.disable()
    try:
        del result
        assert gone() is None
    finally:
        gc.enable()


def _exp(a):
    return (a.exp(),)


@pytest.mark.parametrize("owns", [True, False])
@pytest.mark.parametrize("tile", [None, 4])
def test_a_value_between_stages_that_is_also_a_result(tile, owns):
    rows = {"x": 1, "a": 1, "y": 1}
    inputs = {"x": randn(2, 6, 4, grad=True), "w": randn(4, grad=True)}
    pieces = (
        Piece(lambda x, w: (x * w,), ("x", "w"), ("a",), rows),
        Piece(lambda a: (a.sin() + a,), ("a",), ("y",), rows),
    )
    layer = SmallLayer(pieces, inputs, ("a", "y"), frozenset("w"))
    eager = _whole(layer)
    for fates in every_fate(layer):
        tangents = _tangents(eager[0])
        held = [t.clone() for t in tangents]
        ours = _step(scheduled(layer, fates, tile, owns_gradient=owns), layer, tangents)
        _assert_same(ours, eager, exact=False)
        assert owns or all(torch.equal(a, b) for a, b in zip(tangents, held, strict=True))


@pytest.mark.parametrize("tile", [None, 4])
def test_two_results_that_are_given_one_gradient(tile):
    pieces = (Piece(lambda x, y: (x * 2 + y, x + y * 3), ("x", "y"), ("a", "b"), dict.fromkeys("xyab", 1)),)
    inputs = {"x": randn(1, 6, 4, grad=True), "y": randn(1, 6, 4, grad=True, seed=1)}
    layer = SmallLayer(pieces, inputs, ("a", "b"), frozenset())
    function = scheduled(layer, {}, tile)
    # A backward of `a + b` hands one tensor to both.
    given = randn(1, 6, 4)
    _, ours = _step(function, layer, [given, given])
    _, eager = _step(lambda *i: layer.eager(i), layer, [randn(1, 6, 4)] * 2)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("tile", [None, 4])
def test_two_weights_with_one_gradient(tile):
    pieces = (Piece(lambda x, v, w: (x + v + w,), ("x", "v", "w"), ("y",), {"x": 1, "y": 1}),)
    inputs = {"x": randn(2, 6, 4, grad=True), "v": randn(4, grad=True), "w": randn(4, grad=True, seed=1)}
    layer = SmallLayer(pieces, inputs, ("y",), frozenset("vw"))
    for stages in (None, layer.graphs.compiled(_with_equal_results_merged)):
        ours = _step(scheduled(layer, {}, tile, stages=stages), layer)
        _assert_same(ours, _whole(layer), exact=tile is None)


def _with_equal_results_merged(module, inputs, mode):
    return GraphModule(module, fx_graph_cse(module.graph)).forward


@pytest.mark.parametrize("tile", [None, 4])
def test_a_weight_that_two_stages_read(tile):
    layer = _two_stages(
        lambda x, w: (F.linear(x, w),), lambda a, w: (F.linear(a.sin(), w),),
        {"x": randn(2, 6, 4, grad=True), "w": randn(4, 4, grad=True)}, (("x", "w"), ("a", "w")),
        rows={"x": 1, "a": 1, "y": 1}, shared=("w",),
    )  # fmt: skip
    eager = _whole(layer)
    for fates in every_fate(layer):
        _assert_same(_step(scheduled(layer, fates, tile), layer), eager, exact=tile is None)


@pytest.mark.parametrize("tile", [None, 4])
def test_a_value_whose_reader_gives_it_no_gradient(tile):
    layer = _two_stages(
        lambda x, w: (x * w, x + w), lambda a, b: (a * torch.zeros_like(b),),
        {"x": randn(2, 6, 4, grad=True), "w": randn(4, grad=True)}, (("x", "w"), ("a", "b")),
        gives=("a", "b"), rows={"x": 1, "a": 1, "b": 1, "y": 1}, shared=("w",),
    )  # fmt: skip
    _assert_same(_step(scheduled(layer, {}, tile), layer), _whole(layer), exact=tile is None)


@pytest.mark.parametrize("tile", [None, 4])
def test_slices_of_one_tensor_are_parted_where_they_cross_stages(tile):
    halves = Piece(
        lambda x, w: (F.linear(x, w)[..., :4], F.linear(x, w)[..., 4:]),
        ("x", "w"),
        ("a", "b"),
        {"x": 1, "a": 1, "b": 1},
    )
    whole = Piece(lambda a, b: ((a.sin() * b).cumsum(1),), ("a", "b"), ("y",), {})
    inputs = {"x": randn(1, 6, 4, grad=True), "w": randn(8, 4, grad=True)}
    layer, transfers = SmallLayer((halves, whole), inputs, ("y",), frozenset("w")), new_transfers()
    function = scheduled(layer, {"a": "offload", "b": "offload"}, tile, transfers=transfers)
    _assert_same(_step(function, layer), _whole(layer), exact=tile is None)
    assert transfers.stats.bytes_out == layer.graphs.sizes()["a"] + layer.graphs.sizes()["b"]


REFUSED = {
    "none of it works token by token": (lambda x: (x.softmax(1),), {}),
    "`y` of a stage that runs in tiles does not depend on tokens": (lambda x: (x.sum(1),), {"x": 1}),
    "its result `y` is part of a larger tensor": (lambda x: (x.sin()[..., :2],), {"x": 1, "y": 1}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_run_in_stages_is_refused_by_name(reason):
    function, rows = REFUSED[reason]
    layer = SmallLayer(
        (Piece(function, ("x",), ("y",), rows),), {"x": randn(2, 6, 4, grad=True)}, ("y",), frozenset()
    )
    with pytest.raises(Unstaged, match=reason):
        _ = layer.graphs
