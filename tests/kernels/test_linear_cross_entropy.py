import copy

import pytest
import torch
from torch._inductor.compile_fx import compile_fx

from rewriter.kernels import linear_cross_entropy_chunks as module
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = [torch.float32, torch.bfloat16, torch.float16]
variants = [
    {},
    {"reduction": "sum"},
    {"softcap": 5.0},
    {"scale": 0.25, "label_smoothing": 0.1},
    {"softcap": 5.0, "scale": 2.0, "label_smoothing": 0.1, "ignore_index": 7},
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks at sizes of a test."""
    monkeypatch.setattr(module, "_CPU_BUFFER", 2**12)
    monkeypatch.setattr(module, "_CUDA_BUFFER", 2**12)


def make(tokens=37, hidden=24, vocab=203, dtype=torch.float32, bias=True, ignored=0.4, ignore_index=-100):
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, hidden, device=device) * 0.3).to(dtype)
    b = torch.randn(vocab, device=device).to(dtype) if bias else None
    target = torch.randint(vocab, (tokens,), device=device)
    target[torch.rand(tokens, device=device) < ignored] = ignore_index
    return x, weight, b, target


def run(function, x, weight, bias, target, *, upstream=1.0, dtype=None, **options):
    """Loss and gradients of fresh leaves."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype) for t in (x, weight, bias)]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    loss = function(*leaves, target, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    return [loss.detach()] + [None if t is None else t.grad for t in leaves]


def losses_of_rotations(function, x, weight, bias, target, *, dtype=None, **options):
    """Losses of 32 rotations of ``x``: a sample, where one loss can be right by luck."""
    x, weight, bias = (None if t is None else t.detach().to(dtype or t.dtype) for t in (x, weight, bias))
    return torch.stack([function(x.roll(n, 0), weight, bias, target, **options) for n in range(32)])


def compare(inputs, *, upstream=1.0, **options):
    ours = run(linear_cross_entropy, *inputs, upstream=upstream, **options)
    eager = run(linear_cross_entropy_reference, *inputs, upstream=upstream, **options)
    exact = {**options, "compute_dtype": None, "loss_dtype": torch.float64}
    truth = run(linear_cross_entropy_reference, *inputs, upstream=upstream, dtype=torch.float64, **exact)
    functions = linear_cross_entropy, linear_cross_entropy_reference
    sample = [losses_of_rotations(function, *inputs, **options) for function in functions]
    true_sample = losses_of_rotations(linear_cross_entropy_reference, *inputs, dtype=torch.float64, **exact)
    assert_as_accurate(*sample, true_sample, name="losses")
    # The upstream gradient is not known when the gradient is made, and rounds it once more.
    median = 1.0 if upstream in (1.0, 2.0**-6) else 1.15
    for name, a, b, c in zip(("dx", "dweight", "dbias"), ours[1:], eager[1:], truth[1:], strict=True):
        if c is not None:
            assert_as_accurate(a, b, c, name=name, slack=median)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("options", variants, ids=str)
def test_loss_and_gradients_are_as_accurate_as_eager(dtype, options, small_chunks):
    compare(make(dtype=dtype, ignore_index=options.get("ignore_index", -100)), **options)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_one_chunk_is_as_accurate_as_eager(dtype, ignored):
    compare(make(dtype=dtype, ignored=ignored))


@pytest.mark.parametrize("tokens,hidden,vocab", [(1, 1, 2), (3, 7, 5), (130, 8, 1023), (5, 16, 9001)])
def test_odd_sizes(tokens, hidden, vocab, small_chunks):
    compare(make(tokens, hidden, vocab, torch.bfloat16, bias=False, ignored=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upstream_gradient_that_is_no_power_of_two(dtype, small_chunks):
    compare(make(dtype=dtype), upstream=0.3, reduction="sum")


def test_fp16_gradients_of_a_mean_do_not_underflow(small_chunks):
    inputs = make(tokens=300, hidden=8, vocab=40, dtype=torch.float16)
    compare(inputs, upstream=2.0**-6)
    loss = linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:])
    assert torch.autograd.grad(loss * 2.0**14, inputs[0])[0].abs().max() > 1


@pytest.mark.parametrize("divisor", [13, 13.0])
def test_the_divisor_is_the_number_of_items(divisor, small_chunks):
    compare(make(dtype=torch.bfloat16), reduction="sum", divisor=torch.tensor(divisor, device=device))


def test_autocast_computes_in_its_dtype_and_returns_the_parameters_dtype(small_chunks):
    compare(make(), compute_dtype=torch.bfloat16)


def test_a_loss_without_upcast_has_the_models_dtype():
    x, weight, bias, target = make(dtype=torch.bfloat16)
    assert linear_cross_entropy(x, weight, bias, target, loss_dtype=None).dtype == torch.bfloat16
    compare((x, weight, bias, target), loss_dtype=None)


def test_strided_inputs_and_leading_dimensions(small_chunks):
    x, weight, _, target = make(tokens=24, hidden=48, dtype=torch.bfloat16)
    x, weight = x.view(2, 12, 48)[:, :-1, ::2], weight.t()[::2].t()
    compare((x, weight, None, target.view(2, 12)[:, 1:]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("sync_from", [0, 2**60])
def test_without_any_label_the_result_is_eagers(reduction, tokens, sync_from, monkeypatch):
    monkeypatch.setattr(module, "_SYNC_FROM", sync_from)
    inputs = make(tokens=tokens, ignored=1.1)
    ours = run(linear_cross_entropy, *inputs, reduction=reduction)
    eager = run(linear_cross_entropy_reference, *inputs, reduction=reduction)
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_ignored_rows_get_a_zero_gradient_and_cost_no_product(monkeypatch, small_chunks):
    monkeypatch.setattr(module, "_SYNC_FROM", 0)
    x, weight, bias, target = make()
    rows = []
    chunks = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda n, *a, **k: rows.append(n) or chunks(n, *a, **k))
    _, dx, _, _ = run(linear_cross_entropy, x, weight, bias, target)
    assert rows == [int((target != -100).sum())]
    assert not dx[target == -100].any() and dx[target != -100].any(1).all()


def test_nan_in_the_weight_propagates():
    x, weight, _, target = make(ignored=0.0)
    weight[3, 3] = torch.nan
    loss, dx, dw, _ = run(linear_cross_entropy, x, weight, None, target)
    assert loss.isnan() and dx.isnan().all() and dw.isnan().all()


@pytest.mark.parametrize("frozen", [(1,), (0,), (0, 1), (0, 1, 2)], ids=str)
def test_only_the_gradients_needed_are_computed(frozen, small_chunks):
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(make()[:3])]
    target = make()[3]
    options = (1.0, 0.0, -100, 0.0, True, torch.float32, torch.float32)
    needs = [t.requires_grad for t in leaves]
    outputs = torch.ops.rewriter.linear_cross_entropy(*leaves, target, None, *options, *needs)
    for leaf, gradient in zip(leaves, outputs[1:4], strict=True):
        assert gradient.shape == (leaf.shape if leaf.requires_grad else (0,))
        assert not gradient.requires_grad
    loss = linear_cross_entropy(*leaves, target)
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    assert [t.grad is None for t in leaves] == [i in frozen for i in range(3)]


def test_without_grad_mode_nothing_is_made_for_a_backward():
    x, weight, bias, target = make()
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), weight, bias, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x, weight, bias, target).detach())


def test_chunks_cover_the_rows_and_fit_the_buffer():
    for rows, vocab in [(0, 5), (1, 10**6), (8192, 128256), (8193, 128256), (300000, 262144), (129, 1000)]:
        for cuda, weight_bytes in [(True, 0), (True, 2**30), (False, 0)]:
            chunks = list(module._chunks(rows, vocab, torch.bfloat16, cuda=cuda, weight_bytes=weight_bytes))
            assert [i for c in chunks for i in (c.start, c.stop)][1:-1:2] == [c.start for c in chunks][1:]
            assert sum(c.stop - c.start for c in chunks) == rows
            buffer = max(module._CUDA_BUFFER, weight_bytes // 2) if cuda else module._CPU_BUFFER
            assert all((c.stop - c.start) * vocab * 2 <= max(buffer, vocab * 2) for c in chunks)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("options", variants, ids=str)
def test_the_triton_kernel_of_a_chunk(dtype, gradient, options):
    from rewriter.kernels.linear_cross_entropy_triton import chunk_loss

    options = {"scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "ignore_index": -100, **options}
    options.pop("reduction", None)
    rows, vocab = 5, 4096 + 1024 + 321  # whole iterations, and a rest of more than one
    logits = (torch.randn(rows, vocab + 63, device=device) * 4).to(dtype)[:, :vocab]
    target = torch.randint(vocab, (rows,), device=device)
    target[2] = options["ignore_index"]
    factor = torch.tensor(0.7, device=device)

    def loss_of(z):
        z = z * options["scale"]
        if options["softcap"]:
            z = torch.tanh(z / options["softcap"]) * options["softcap"]
        return torch.nn.functional.cross_entropy(
            z.to(torch.promote_types(z.dtype, torch.float32)),
            target,
            reduction="none",
            ignore_index=options["ignore_index"],
            label_smoothing=options["label_smoothing"],
        )

    def eager(z):
        z = z.detach().requires_grad_()
        losses = loss_of(z)
        losses.backward(factor.to(losses.dtype).expand_as(losses))
        return losses.detach(), z.grad

    (eager_losses, eager_gradient), (true_losses, true_gradient) = eager(logits), eager(logits.double())
    losses = torch.full((rows,), torch.nan, device=device)
    before = logits.clone()
    made = chunk_loss(logits, target, factor, losses, gradient=gradient, **options)
    assert_as_accurate(losses, eager_losses, true_losses, name="losses")
    if not gradient:
        assert torch.equal(logits, before)
        return
    assert made is logits and not logits[2].any()
    assert_as_accurate(logits, eager_gradient, true_gradient, name="gradient")


@pytest.mark.parametrize("vocab", [2, 513, 2048])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_triton_kernel_takes_rows_of_any_length_and_alignment(vocab, offset):
    from rewriter.kernels.linear_cross_entropy_triton import chunk_loss

    rows = 4
    logits = torch.randn(rows, vocab + offset, device=device).bfloat16()[:, offset:]
    logits[:, 5:9] = float("-inf")
    target = torch.tensor([0, vocab - 1, vocab // 2, -100], device=device)
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    expected.sum().backward()
    losses, factor = torch.empty(rows, device=device), torch.ones((), device=device)
    options = {"scale": 1.0, "softcap": 0.0, "ignore_index": -100, "label_smoothing": 0.0}
    chunk_loss(logits, target, factor, losses, gradient=True, **options)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 513, 2**40])
def test_a_label_that_no_column_has_is_nan_in_its_row_and_touches_no_other(label):
    from rewriter.kernels.linear_cross_entropy_triton import chunk_loss

    logits = torch.randn(3, 513, device=device).bfloat16()
    options = {"scale": 1.0, "softcap": 0.0, "ignore_index": -100, "label_smoothing": 0.0, "gradient": True}
    factor = torch.ones((), device=device)

    def run_with(label):
        made, losses = logits.clone(), torch.empty(3, device=device)
        chunk_loss(made, torch.tensor([4, label, 7], device=device), factor, losses, **options)
        return made, losses

    (made, losses), (expected, expected_losses) = run_with(label), run_with(5)
    assert made[1].isnan().all() and losses[1].isnan()
    assert torch.equal(made[::2], expected[::2]) and torch.equal(losses[::2], expected_losses[::2])


@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True), (False, False, False)], ids=str)
def test_opcheck(needs):
    x, weight, bias, target = make(dtype=torch.bfloat16)
    leaves = [t.requires_grad_(n) for t, n in zip((x, weight, bias), needs, strict=True)]
    options = (1.0, 0.0, -100, 0.0, True, torch.bfloat16, torch.float32)
    op = torch.ops.rewriter.linear_cross_entropy.default
    torch.library.opcheck(op, (*leaves, target, None, *options, *needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_by_aot_autograd_it_gives_eagers_gradients(dynamic):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (37, 51):
        inputs = make(tokens=tokens)
        for a, b in zip(run(compiled, *inputs), run(linear_cross_entropy, *inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_as_a_target_in_a_torch_level_graph_inductor_compiles_it_for_any_length():
    def backend(gm, example_inputs):
        gm = copy.deepcopy(gm)
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is torch.nn.functional.cross_entropy:
                x, weight, bias = node.args[0].args
                with gm.graph.inserting_before(node):
                    fused = gm.graph.call_function(linear_cross_entropy, (x, weight, bias, node.args[1]))
                node.replace_all_uses_with(fused)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return compile_fx(gm, example_inputs)

    def loss_of(x, weight, bias, target):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x * 2, weight, bias), target)

    compiled = torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (37, 51):
        inputs = make(tokens=tokens)
        for a, b in zip(run(compiled, *inputs), run(loss_of, *inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"weight": torch.zeros(5, 9)}, "does not fit weight"),
        ({"bias": torch.zeros(4)}, r"expected \(vocab,\)"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "3 labels for 2 tokens"),
        ({"target": torch.zeros(2, 5)}, "probabilities"),
        ({"reduction": "none"}, "'none' is neither"),
        ({"label_smoothing": 1.5}, "outside"),
    ],
)
def test_bad_input_is_named(change, words):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(5, 8), "bias": None}
    given["target"] = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{**given, **change})


def test_fp64_runs_the_reference():
    x, weight, bias, target = (t.double() if t.is_floating_point() else t for t in make())
    assert linear_cross_entropy(x, weight, bias, target, loss_dtype=None).dtype == torch.float64
