"""The rotary pass on the models' own functions: every layout, every guard, the calls and the numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import rewriter
from rewriter.fusion import apply
from rewriter.passes.rotary import rotary_pass
from rewriter.report import PassRecord
from tests.capture import capture as capture_model
from tests.families import batch, build

BATCH, HEADS, KV_HEADS, TOKENS, HEAD = 2, 4, 2, 6, 16


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def both(one: Callable) -> Callable:
    def pair(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return one(q, cos, sin), one(k, cos, sin)

    return pair


@both
def llama(x, cos, sin):
    return (x * cos) + (rotate_half(x) * sin)


@both
def phi(x, cos, sin):
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, passed), dim=-1)


@both
def olmo(x, cos, sin):
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


@both
def vision(x, cos, sin):
    turned = x.float()
    return (turned * cos.float() + rotate_half(turned) * sin.float()).to(x.dtype)


@both
def cohere(x, cos, sin):
    turned = x.float()
    return (turned * cos + rotate_pairs(turned) * sin).to(dtype=x.dtype)


def ernie(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    q_embed = q.float() * cos + rotate_pairs(q).float() * sin
    k_embed = k.float() * cos + rotate_pairs(k).float() * sin
    return q_embed.to(q.dtype), k_embed.to(k.dtype)


@both
def halves_cast_late(x, cos, sin):
    return (x.float() * cos + rotate_half(x).float() * sin).to(x.dtype)


def glm(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    r = cos.shape[-1]
    q_rot, q_pass, k_rot, k_pass = q[..., :r], q[..., r:], k[..., :r], k[..., r:]
    q_embed, k_embed = q_rot * cos + rotate_pairs(q_rot) * sin, k_rot * cos + rotate_pairs(k_rot) * sin
    return torch.cat([q_embed, q_pass], dim=-1), torch.cat([k_embed, k_pass], dim=-1)


def gpt_j(q, k, cos, sin):
    def turn(x, sin, cos):
        sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
        cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
        turned = torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    q, k = q.transpose(1, 2), k.transpose(1, 2)
    r = 2 * cos.shape[-1]
    q_rot, q_pass, k_rot, k_pass = q[:, :, :, :r], q[:, :, :, r:], k[:, :, :, :r], k[:, :, :, r:]
    return torch.cat([turn(q_rot, sin, cos), q_pass], dim=-1), torch.cat(
        [turn(k_rot, sin, cos), k_pass], dim=-1
    )


@both
def gpt_oss(x, cos, sin):
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@both
def sliced_half_cos(x, cos, sin):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@both
def stacked_half_cos(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


@both
def deepseek(x, cos, sin):
    b, h, t, d = x.shape
    x = x.view(b, h, t, d // 2, 2).transpose(4, 3).reshape(b, h, t, d)
    return x * cos + rotate_half(x) * sin


@both
def deepseek_half_cos(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# Each function, the number of its factors, the layout, rotary_dim, and compute_dtype of bf16 inputs.
VARIANTS = [
    (llama, HEAD, "halves", None, None),
    (phi, 8, "halves", 8, None),
    (phi, HEAD, "halves", HEAD, None),
    (olmo, HEAD, "halves", None, torch.float32),
    (vision, HEAD, "halves", None, torch.float32),
    (cohere, HEAD, "interleaved", None, torch.float32),
    (ernie, HEAD, "interleaved_half_cos", None, torch.float32),
    (halves_cast_late, HEAD, "halves", None, torch.float32),
    (glm, 8, "interleaved_half_cos", 8, None),
    (gpt_oss, HEAD // 2, "halves_half_cos", None, None),
    (sliced_half_cos, HEAD // 2, "halves_half_cos", None, None),
    (stacked_half_cos, HEAD // 2, "interleaved_half_cos", None, None),
    (deepseek, HEAD, "pairs_to_halves", None, None),
    (deepseek_half_cos, HEAD // 2, "pairs_to_halves_half_cos", None, None),
]
NAMES = [
    "llama", "phi", "phi_whole", "olmo", "vision", "cohere", "ernie", "halves_cast_late", "glm",
    "gpt_oss", "sliced_half_cos", "stacked_half_cos", "deepseek", "deepseek_half_cos",
]  # fmt: skip


def inputs(
    factors: int = HEAD, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, tokens, HEAD, generator=generator).to(dtype)
    k = torch.randn(BATCH, KV_HEADS, tokens, HEAD, generator=generator).to(dtype)
    angles = torch.randn(1, tokens, factors, generator=generator)
    return q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin()


def capture(function: Callable, *args, dynamic: bool | None = None) -> fx.GraphModule:
    graphs = []

    def record(graph: fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    return graphs[0]


def rewritten(function: Callable, *args, dynamic: bool | None = None) -> tuple[fx.GraphModule, PassRecord]:
    new, record = apply(rotary_pass, capture(function, *args, dynamic=dynamic))
    assert record.error is None
    return new, record


def calls(module: fx.GraphModule) -> list[tuple]:
    """Each rotation as (name, number of tensors it turns, layout, rotary_dim, compute_dtype)."""
    nodes = [n for n in module.graph.nodes if getattr(n.target, "__name__", "") in ("rotary", "rotary_one")]
    return [(n.target.__name__, *n.args[-3:]) for n in nodes]


def left(function: Callable, *args) -> list[str]:
    """The reasons for which ``function`` stays as it is."""
    new, record = rewritten(function, *args)
    assert calls(new) == []
    return [miss.reason for miss in record.misses]


def gradients(function: Callable, args: tuple[Tensor, ...]) -> list[Tensor]:
    results = function(*args)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, [a for a in args if a.requires_grad], upstream)]


@pytest.mark.parametrize(
    ("function", "factors", "layout", "rotary_dim", "compute_dtype"), VARIANTS, ids=NAMES
)
def test_q_and_k_of_each_layout_become_one_call(function, factors, layout, rotary_dim, compute_dtype):
    new, record = rewritten(function, *inputs(factors, torch.bfloat16))
    assert calls(new) == [("rotary", layout, rotary_dim, compute_dtype)]
    assert [(match.rewrite, match.count) for match in record.matches] == [(layout, 1)]
    assert record.misses == ()
    assert not [
        n for n in new.graph.nodes if getattr(n.target, "__name__", n.target) in ("neg", "cat", "stack")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "factors"), [v[:2] for v in VARIANTS], ids=NAMES)
def test_results_and_gradients_stay_the_same(function, factors, dtype):
    args = inputs(factors, dtype)
    new, _ = rewritten(function, *args)
    order = {n.target: n for n in new.graph.find_nodes(op="placeholder")}
    named = dict(zip(("q", "k", "cos", "sin"), args, strict=True))

    def run(*tensors):
        given = dict(zip(named, tensors, strict=True))
        return new(*(given[name.strip("Ll_").removesuffix("_")] for name in order))

    for ours, theirs in zip(gradients(run, args), gradients(function, args), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6 if dtype == torch.bfloat16 else 1e-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpt_j_whose_slices_name_every_dimension_turns_pairs(dtype):
    args = inputs(4, dtype)
    new, _ = rewritten(gpt_j, *args)
    layouts = [layout for _, layout, *_ in calls(new)]
    assert layouts == ["interleaved_half_cos"]


def test_factors_that_are_repeated_for_each_keep_q_and_k_apart_where_they_are_written():
    def written(q, k, cos, sin):
        cos, sin = cos * 1, sin * 1
        turned = q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1)
        cos.mul_(2)
        return turned, k * cos.unsqueeze(1) + rotate_half(k) * sin.unsqueeze(1)

    new, _ = rewritten(written, *(x.detach() for x in inputs()))
    assert [name for name, *_ in calls(new)] == ["rotary_one", "rotary_one"]


def test_symbolic_lengths_are_matched_and_serve_another_length():
    torch._dynamo.reset()
    compiled = torch.compile(phi, backend="rewriter", options={"lowering": "eager"})
    with rewriter.inspect() as report:
        for tokens in (TOKENS, TOKENS + 3):
            args = inputs(8, tokens=tokens)
            for x, dim in zip(args, (2, 2, 1, 1), strict=True):
                torch._dynamo.mark_dynamic(x, dim)
            for ours, theirs in zip(compiled(*args), phi(*args), strict=True):
                torch.testing.assert_close(ours, theirs)
    assert report.counts()["rotary"] == 1


def test_a_head_of_symbolic_size_is_left():
    new, record = rewritten(llama, *inputs(), dynamic=True)
    assert calls(new) == []
    assert [miss.reason for miss in record.misses] == ["the last dimension is not a constant"]


def test_two_layers_with_one_cosine_are_paired_layer_by_layer():
    def layers(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for _ in range(2):
            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
            k = k + q[:, :KV_HEADS].sin()
        return q, k

    new, _ = rewritten(layers, *inputs())
    assert [name for name, *_ in calls(new)] == ["rotary", "rotary"]


def test_k_projected_after_q_is_turned_shares_its_call():
    def late(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + rotate_half(q) * sin
        k = k * 2
        k = k * cos + rotate_half(k) * sin
        return q, k

    new, _ = rewritten(late, *inputs())
    assert [name for name, *_ in calls(new)] == ["rotary"]


def test_k_that_depends_on_the_turned_q_gets_a_call_of_its_own():
    def chained(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + rotate_half(q) * sin
        k = k * q.mean()
        return q, k * cos + rotate_half(k) * sin

    new, record = rewritten(chained, *inputs())
    assert [name for name, *_ in calls(new)] == ["rotary_one", "rotary_one"]
    assert record.misses == ()


def test_cosines_of_their_own_keep_q_and_k_apart():
    def apart(q, k, cos, sin):
        q_cos, q_sin, k_cos, k_sin = cos.unsqueeze(1), sin.unsqueeze(1), cos[:, None] * 2, sin[:, None] * 2
        return q * q_cos + rotate_half(q) * q_sin, k * k_cos + rotate_half(k) * k_sin

    new, _ = rewritten(apart, *inputs())
    assert [name for name, *_ in calls(new)] == ["rotary_one", "rotary_one"]


def test_one_tensor_alone_is_turned():
    new, _ = rewritten(lambda q, k, cos, sin: q * cos + rotate_half(q) * sin, *inputs())
    assert calls(new) == [("rotary_one", "halves", None, None)]


def test_a_grad_mode_between_q_and_k_keeps_them_apart():
    def modes(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + rotate_half(q) * sin
        with torch.no_grad():
            k = k * cos + rotate_half(k) * sin
        return q, k

    new, _ = rewritten(modes, *inputs())
    assert [name for name, *_ in calls(new)] == ["rotary_one", "rotary_one"]


def test_a_write_into_k_between_the_two_keeps_them_apart():
    def written(q, k, cos, sin):
        cos, sin, k = cos.unsqueeze(1), sin.unsqueeze(1), k * 1
        q = q * cos + rotate_half(q) * sin
        k.mul_(2)
        return q, k * cos + rotate_half(k) * sin

    assert "rotary" not in [name for name, *_ in calls(rewritten(written, *inputs())[0])]


def test_trained_cosines_are_left():
    q, k, cos, sin = inputs()
    assert any("cos is trained" in reason for reason in left(llama, q, k, cos.requires_grad_(), sin))


def test_double_precision_is_left():
    reasons = left(llama, *(x.detach().double().requires_grad_(x.requires_grad) for x in inputs()))
    assert any("x of torch.float64" in reason for reason in reasons)


def test_cosines_that_differ_between_heads_are_left():
    q, _, cos, sin = inputs()
    wide = [c.unsqueeze(1).expand(BATCH, HEADS, TOKENS, HEAD).contiguous() for c in (cos, sin)]
    reasons = left(lambda q, cos, sin: q * cos + rotate_half(q) * sin, q, *wide)
    assert any("differs between heads" in reason for reason in reasons)


def test_more_than_four_dimensions_are_left():
    q, _, cos, sin = inputs()
    reasons = left(
        lambda q, cos, sin: q * cos + rotate_half(q) * sin, q.unsqueeze(0), cos[:, None], sin[:, None]
    )
    assert any("x of 5 dimensions" in reason for reason in reasons)


def test_a_rotated_half_that_is_also_returned_is_left():
    def kept(q, k, cos, sin):
        half = rotate_half(q)
        return q * cos.unsqueeze(1) + half * sin.unsqueeze(1), half

    assert any("is also returned" in reason for reason in left(kept, *inputs()))


def test_a_turn_in_the_other_direction_is_left():
    def backwards(q, k, cos, sin):
        half = torch.cat((q[..., HEAD // 2 :], -q[..., : HEAD // 2]), dim=-1)
        return q * cos.unsqueeze(1) + half * sin.unsqueeze(1)

    assert left(backwards, *inputs())


def test_a_complex_rotation_is_left_and_reported():
    def complex_form(q, k, cos, sin):
        pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(cos, sin)[:, None]).flatten(3)

    assert any(
        reason.startswith("none of pairs_to_halves") for reason in left(complex_form, *inputs(HEAD // 2))
    )


def test_a_view_that_needs_the_order_of_cat_is_left():
    def viewed(q, k, cos, sin):
        q = q.reshape(BATCH, TOKENS, HEADS, HEAD).transpose(1, 2)
        turned, passed = q[..., :8], q[..., 8:]
        turned = turned * cos.unsqueeze(1) + rotate_half(turned) * sin.unsqueeze(1)
        return torch.cat((turned, passed), dim=-1).view(BATCH, HEADS, TOKENS * HEAD)

    assert any("memory order" in reason for reason in left(viewed, *inputs(8)))


def test_a_reshape_takes_any_memory_order():
    def reshaped(q, k, cos, sin):
        q = q.reshape(BATCH, TOKENS, HEADS, HEAD).transpose(1, 2)
        turned, passed = q[..., :8], q[..., 8:]
        turned = turned * cos.unsqueeze(1) + rotate_half(turned) * sin.unsqueeze(1)
        return torch.cat((turned, passed), dim=-1).reshape(BATCH, HEADS, TOKENS * HEAD)

    assert calls(rewritten(reshaped, *inputs(8))[0]) == [("rotary_one", "halves", 8, None)]


def test_other_negations_are_not_reported():
    assert left(lambda q, k, cos, sin: torch.exp(-q) - k.sum(), *inputs()) == []


# Each form of rotation, and packed and partial ones; layers without a rotation (SmolLM3, Cohere2) count none.
FAMILY_SITES = {
    "llama": {"halves": 2},
    "phi": {"halves": 2},
    "phi3": {"halves": 2},
    "smollm3": {"halves": 1},
    "cohere2": {"interleaved": 1},
    "glm4": {"interleaved_half_cos": 2},
    "gpt_oss": {"halves_half_cos": 2},
    "deepseek_v3": {"pairs_to_halves_half_cos": 2},
}


@pytest.mark.parametrize("family", FAMILY_SITES)
def test_every_rotary_pair_of_a_family_is_rewritten(family):
    graphs = capture_model(build(family), **batch())
    records = [apply(rotary_pass, graph) for graph, _ in graphs]
    found = {m.rewrite: m.count for _, record in records for m in record.matches}
    assert found == FAMILY_SITES[family]
    assert {name for new, _ in records for name, *_ in calls(new)} == {"rotary"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"dynamic": True}),
        ("llama", {"autocast": True}),
        ("cohere2", {"dynamic": True}),
        ("cohere2", {"dtype": torch.bfloat16, "lora": True}),
    ],
)
def test_rotary_pairs_are_found_in_lora_dynamic_and_autocast_graphs(family, options):
    options = dict(options)
    dynamic, autocast = (
        options.pop("dynamic", None),
        torch.bfloat16 if options.pop("autocast", False) else None,
    )
    graphs = capture_model(build(family, **options), dynamic=dynamic, autocast=autocast, **batch())
    found = {m.rewrite: m.count for graph, _ in graphs for m in apply(rotary_pass, graph)[1].matches}
    assert found == FAMILY_SITES[family]
