"""Attention functions over every mask, as models build them, for the attention pass's tests."""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.fusion import apply
from rewriter.passes.attention import attention_pass
from rewriter.report import PassRecord

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 12, 8
NAMES = ("causal_attention", "full_attention", "attention", "scaled_dot_product_attention")


def capture(function: Callable, *args, dynamic: bool | None = None, **kwargs) -> tuple[fx.GraphModule, list]:
    """The one graph that Dynamo makes of ``function``, and the real inputs that it is called with."""
    seen: list = []

    def record(graph: fx.GraphModule, _fakes: list) -> Callable:
        def call(*inputs):
            seen.append((graph, list(inputs)))
            return graph(*inputs)

        return call

    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return seen[0]


def rewritten(function: Callable, *args, dynamic: bool | None = None) -> tuple[fx.GraphModule, PassRecord]:
    new, record = apply(attention_pass, capture(function, *args, dynamic=dynamic)[0])
    assert record.error is None
    return new, record


def calls(module: fx.GraphModule) -> list[str]:
    """Each attention in ``module`` as ``name(argument=value, ...)``, without q, k, v and the scale."""
    parts = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    nodes = [n for part in parts for n in part.graph.nodes if getattr(n.target, "__name__", "") in NAMES]
    return [f"{n.target.__name__}({', '.join(f'{k}={v}' for k, v in _shown(n))})" for n in nodes]


def _shown(node: fx.Node) -> list[tuple[str, object]]:
    numbers = [("dropout", a) for a in node.args[4:] if a]
    return numbers + [(k, v) for k, v in node.kwargs.items() if k not in ("scale", "dropout_p", "is_causal")]


def square_tensors(module: fx.GraphModule) -> list[str]:
    """The nodes, checkpoint bodies' too, whose last two dimensions are both the number of tokens."""
    parts = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    shapes = {n.name: getattr(n.meta.get("example_value"), "shape", ()) for p in parts for n in p.graph.nodes}
    return [name for name, shape in shapes.items() if tuple(shape[-2:]) == (TOKENS, TOKENS)]


def without_names(call: str) -> str:
    """``sinks=<node>`` as ``sinks``, and likewise for the other tensors."""
    return re.sub(r"=(?!True|False)[A-Za-z_]\w*", "", call)


def boolean_squares(module: fx.GraphModule) -> list[str]:
    """Of ``square_tensors``, the boolean ones of four dimensions: masks, whatever other sizes a model has."""
    parts = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    nodes = {n.name: n.meta.get("example_value") for part in parts for n in part.graph.nodes}
    squares = {name: v for name, v in nodes.items() if tuple(getattr(v, "shape", ())[2:]) == (TOKENS, TOKENS)}
    return [name for name, v in squares.items() if v.dtype == torch.bool]


def qkv(kv_heads: int = KV_HEADS, tokens: int = TOKENS, dim: int = DIM, keys: int | None = None) -> tuple:
    sizes = ((HEADS, tokens), (kv_heads, keys or tokens), (kv_heads, keys or tokens))
    return tuple(torch.randn(BATCH, h, n, dim, requires_grad=True) for h, n in sizes)


def repeat(x: torch.Tensor, times: int = HEADS // KV_HEADS) -> torch.Tensor:
    batch, heads, tokens, dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, tokens, dim)
    return x.reshape(batch, heads * times, tokens, dim)


def masked(mask: Callable) -> Callable:
    """Grouped ``scaled_dot_product_attention`` under ``mask(q, *inputs)``."""

    def function(q, k, v, *inputs):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask(q, *inputs))

    return function


def positions(x: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of batch, queries and keys that broadcast to a mask's four dimensions."""
    batch, tokens = torch.arange(x.shape[0]), torch.arange(x.shape[2]) + offset
    return batch[:, None, None, None], tokens[None, None, :, None], tokens[None, None, None, :]


def documents(position_ids: torch.Tensor) -> torch.Tensor:
    """The number of the document that each token belongs to, from where positions jump."""
    first = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)


def causal(q):
    _, row, column = positions(q)
    allowed = row.new_ones((), dtype=torch.bool) & (column <= row).to(row.device)
    return allowed.expand(q.shape[0], -1, q.shape[2], q.shape[2])


def causal_with_offsets(q):
    _, row, column = positions(q, offset=3)
    return column <= row


def causal_strict(q):
    _, row, column = positions(q)
    return (row + 1 > column)[:, :, :, : q.shape[2]]


def causal_in_two_dimensions(q):
    tokens = torch.arange(q.shape[2])
    return tokens.view(1, -1) <= tokens.unsqueeze(1)


def causal_additive(q):
    return torch.where(causal(q), torch.tensor(0.0), torch.finfo(torch.float32).min)


def causal_infinite(q):
    return torch.where(causal(q), 0.0, float("-inf"))


def one_document(q):
    batch, row, column = positions(q)
    number = documents((torch.arange(q.shape[2]) + 5)[None].expand(q.shape[0], -1))
    return (column <= row) & (number[batch, row] == number[batch, column])


def window(q, size=5):
    _, row, column = positions(q)
    return row.new_ones((), dtype=torch.bool) & (column > row - size) & (column <= row)


def wide_window(q):
    return window(q, size=TOKENS)


def chunks(q, size=4):
    _, row, column = positions(q)
    return (column // size == row // size) & (column <= row)


def chunks_after_padding(q, padding):
    batch, row, column = positions(q)
    return ((column - padding[batch]) // 4 == (row - padding[batch]) // 4) & (column <= row)


def chunks_without_padding(q):
    return chunks_after_padding(q, torch.zeros(q.shape[0], dtype=torch.int64))


def packed(q, position_ids):
    batch, row, column = positions(q)
    number = documents(position_ids)
    return (column <= row) & (number[batch, row] == number[batch, column])


def padded(q, kept):
    batch, row, column = positions(q)
    return (column <= row) & kept.to(torch.bool)[batch, column]


def padded_by_view(q, kept):
    _, row, column = positions(q)
    return (column <= row) & (kept[:, None, None, :] != 0)


def only_padded(q, kept):
    return kept[:, None, None, :].bool()


def everything(q, kept, position_ids):
    return window(q) & packed(q, position_ids) & padded(q, kept)


def position_ids() -> torch.Tensor:
    return torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None].expand(BATCH, -1)


def kept() -> torch.Tensor:
    """The first row padded by three on the left, the second by two on the right."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    return mask
