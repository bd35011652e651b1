"""Rotary position embedding of q and k in one launch, forward and backward.

Each pair of features ``(a, b)`` of a token is turned by its angle: ``(a·cos − b·sin, b·cos + a·sin)``, after
Su et al., "RoFormer" (2021). A ``layout`` says where models keep the pairs and their factors:

===================  ======================  ======================  ===============================
layout               pairs in x              pairs in the result     written as
===================  ======================  ======================  ===============================
``halves``           ``x[i], x[i + R/2]``    the same                ``rotate_half`` (Llama)
``interleaved``      ``x[2i], x[2i + 1]``    the same                ``stack().flatten(-2)`` (Cohere)
``pairs_to_halves``  ``x[2i], x[2i + 1]``    ``y[i], y[i + R/2]``    even and odd, ``cat`` (DeepSeek)
===================  ======================  ======================  ===============================

``cos`` and ``sin`` hold R factors, in the order of the result; with the suffix ``_half_cos`` (GPT-OSS:
``halves_half_cos``) only R/2, one a pair. Features from R on pass through (partial rotary: Phi, GPT-NeoX).

Bytes moved per element of bf16 q and k: 4 forward, 4 backward, and cos and sin once a token. Eager moves 20
forward (negate, concatenate, two products, a sum), and rounds each product to the dtype; here they are
computed in fp32 and rounded once. The backward turns back with the sine negated and saves nothing
but cos and sin, which get no gradient themselves: where they want one, the reference runs.

Refused, in favour of the reference: complex forms (Llama 4), cosines that differ between heads, heads beyond
8192 features, dtypes other than bf16, fp16 and fp32.
"""

import torch
from torch import Tensor

from rewriter.kernels.registration import define, differentiate
from rewriter.kernels.rotary_layouts import check_rotary, rotary_reference, turned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 8192


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    rotary_dim: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate ``q`` and ``k``; products and sums in fp32, rounded once.

    Args:
        q: (batch, heads, tokens, head) or (batch, tokens, heads, head), any strides; copied only if the last
            dimension is not dense.
        k: as ``q``, possibly with fewer heads, or None.
        cos, sin: broadcastable to ``q`` but for the last dimension, of size 1 along the heads, as
            (1, 1, tokens, R) or (batch, tokens, 1, R); any strides, of the inputs' dtype or another.
        layout: one of ``LAYOUTS``, see above.
        rotary_dim: R, the leading features that turn. None: as ``cos`` and ``layout`` say; anything else is
            checked against that.
        compute_dtype: None where the model rotates as it is: the result has the promoted dtype of the
            operands. Else the model casts q and k to this dtype, and the results back to their own.

    Returns:
        The rotated q and k, dense in the memory order of q and k. Saved for the backward: cos and sin.

    Raises:
        ValueError: unknown layout; ``rotary_dim`` is odd, exceeds the head or contradicts ``cos``.
    """
    check_rotary(q, k, cos, sin, layout, rotary_dim)
    if not _kernel_serves(q, k, cos, sin, compute_dtype):
        return rotary_reference(q, k, cos, sin, layout, rotary_dim, compute_dtype)
    if k is None:
        return torch.ops.rewriter.rotary_one(q, cos, sin, layout, compute_dtype), None
    return torch.ops.rewriter.rotary(q, k, cos, sin, layout, compute_dtype)


def rotary_one(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    rotary_dim: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate one tensor; arguments, result and errors as for ``rotary``."""
    return rotary(x, None, cos, sin, layout, rotary_dim, compute_dtype)[0]


def _kernel_serves(q, k, cos, sin, compute_dtype) -> bool:
    if not q.is_cuda or cos.requires_grad or sin.requires_grad:
        return False
    operands = (q, cos, sin) if k is None else (q, k, cos, sin)
    if any(x.dtype not in DTYPES for x in operands) or compute_dtype not in (None, *DTYPES):
        return False
    if k is not None and (k.dim() != q.dim() or k.shape[-1] != q.shape[-1]):
        return False
    if q.dim() not in (2, 3, 4) or cos.dim() > q.dim() or q.shape[-1] > LARGEST_HEAD:
        return False
    return _shared_by_heads(q, k, cos)


def _shared_by_heads(q, k, cos) -> bool:
    """Whether q and k differ in at most one dimension, and share their cosines along that one, or any."""
    missing = q.dim() - cos.dim()
    leading = range(q.dim() - 1)
    shared = [d for d in leading if d < missing or cos.shape[d - missing] == 1]
    if any(d not in shared and cos.shape[d - missing] != q.shape[d] for d in leading):
        return False
    differing = [d for d in leading if k is not None and q.shape[d] != k.shape[d]]
    if differing:
        return len(differing) == 1 and differing[0] in shared
    return bool(shared) or q.dim() < 4


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of ``x`` from the slowest to the fastest, the last one always at the end."""
    last = x.dim() - 1
    return [*sorted(range(last), key=x.stride().__getitem__, reverse=True), last]


def _empty_in_order(x: Tensor, order: list[int], dtype: torch.dtype) -> Tensor:
    """An empty dense tensor of ``x``'s shape whose memory runs in ``order``."""
    strides, step = [1] * len(order), 1
    for d in reversed(order):
        strides[d] = step
        step = step * x.shape[d]
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)


def _result(x: Tensor, cos: Tensor, sin: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    dtype = x.dtype
    if compute_dtype is None:
        dtype = torch.promote_types(torch.promote_types(dtype, cos.dtype), sin.dtype)
    return _empty_in_order(x, _memory_order(x), dtype)


def _launch(q, q_out, k, k_out, cos, sin, layout, backward=False):
    from rewriter.kernels import rotary_triton as kernels

    from_pairs, to_pairs = not layout.startswith("halves"), layout.startswith("interleaved")
    if layout.endswith("_half_cos"):
        cosines = kernels.HALF_SIZE
    else:
        cosines = kernels.INTERLEAVED if to_pairs else kernels.HALVES
    kernels.rotate(
        q,
        q_out,
        k,
        k_out,
        cos,
        sin,
        rotary_dim=turned(cos, layout),
        in_interleaved=to_pairs if backward else from_pairs,
        out_interleaved=from_pairs if backward else to_pairs,
        cosines=cosines,
        backward=backward,
    )


def _fake(q, k, cos, sin, layout, compute_dtype=None):
    return _result(q, cos, sin, compute_dtype), _result(k, cos, sin, compute_dtype)


def _kernel(q, k, cos, sin, layout, compute_dtype=None):
    check_rotary(q, k, cos, sin, layout)
    q_out, k_out = _fake(q, k, cos, sin, layout, compute_dtype)
    _launch(q, q_out, k, k_out, cos, sin, layout)
    return q_out, k_out


def _one_fake(x, cos, sin, layout, compute_dtype=None):
    return _result(x, cos, sin, compute_dtype)


def _one_kernel(x, cos, sin, layout, compute_dtype=None):
    check_rotary(x, None, cos, sin, layout)
    out = _one_fake(x, cos, sin, layout, compute_dtype)
    _launch(x, out, None, None, cos, sin, layout)
    return out


def _backward_fake(dq, dk, cos, sin, layout, q_dtype, k_dtype, q_order, k_order):
    return _empty_in_order(dq, q_order, q_dtype), _empty_in_order(dk, k_order, k_dtype)


def _backward_kernel(dq, dk, cos, sin, layout, q_dtype, k_dtype, q_order, k_order):
    outs = _backward_fake(dq, dk, cos, sin, layout, q_dtype, k_dtype, q_order, k_order)
    _launch(dq, outs[0], dk, outs[1], cos, sin, layout, backward=True)
    return outs


def _one_backward_fake(dy, cos, sin, layout, dtype, order):
    return _empty_in_order(dy, order, dtype)


def _one_backward_kernel(dy, cos, sin, layout, dtype, order):
    out = _empty_in_order(dy, order, dtype)
    _launch(dy, out, None, None, cos, sin, layout, backward=True)
    return out


_forward = define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, str layout, ScalarType? compute_dtype=None)"
    " -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
)
_one_forward = define(
    "rotary_one(Tensor x, Tensor cos, Tensor sin, str layout, ScalarType? compute_dtype=None) -> Tensor",
    kernel=_one_kernel,
    fake=_one_fake,
)
_backward = define(
    "rotary_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, str layout, ScalarType q_dtype,"
    " ScalarType k_dtype, int[] q_order, int[] k_order) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
_one_backward = define(
    "rotary_one_backward(Tensor dy, Tensor cos, Tensor sin, str layout, ScalarType dtype, int[] order)"
    " -> Tensor",
    kernel=_one_backward_kernel,
    fake=_one_backward_fake,
)


def _setup_context(ctx, inputs, output):
    *xs, cos, sin, ctx.layout, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.targets = [(x.dtype, _memory_order(x)) for x in xs]
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    (q_dtype, q_order), (k_dtype, k_order) = ctx.targets
    dq, dk = (dy if wanted else None for dy, wanted in zip((dq, dk), ctx.needs_input_grad, strict=False))
    if dq is not None and dk is not None:
        dq, dk = _backward(dq, dk, cos, sin, ctx.layout, q_dtype, k_dtype, q_order, k_order)
    elif dq is not None:
        dq = _one_backward(dq, cos, sin, ctx.layout, q_dtype, q_order)
    elif dk is not None:
        dk = _one_backward(dk, cos, sin, ctx.layout, k_dtype, k_order)
    return dq, dk, None, None, None, None


def _one_gradients(ctx, dy):
    cos, sin = ctx.saved_tensors
    dx = None if dy is None else _one_backward(dy, cos, sin, ctx.layout, *ctx.targets[0])
    return dx, None, None, None, None


differentiate(_forward, _gradients, _setup_context)
differentiate(_one_forward, _one_gradients, _setup_context)
