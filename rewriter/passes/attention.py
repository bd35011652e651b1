"""Attention over a dense mask, to attention over the terms that the mask was made of.

- A mask proven to be causal and nothing else: PyTorch's causal attention.
- Windows, chunks, packed documents, padding, capped logits and sinks: ``rewriter.kernels.attention``, which
  evaluates the terms in registers.
- K and V repeated for grouped queries are read unrepeated.

Both ``scaled_dot_product_attention`` and attention written out by hand are matched (``softmax(q @ k.T * scale
+ mask) @ v``, with ``tanh`` around the logits, or sinks beside them). Dead-code elimination then removes the
mask. Pays because a mask of S×S booleans takes S² bytes (90 GB at S = 300,000), is read by every layer, and
turns flash kernels off: causal attention skips half of the products, a window of W all but W·S.

Devices other than CUDA rebuild the mask from its terms, which costs them next to nothing.

Refuses: a mask with a term that is not proven (``rewriter.mask_terms`` says which); dropout with anything
but a causal mask; weights that the model also returns; dtypes and head sizes that the kernel does not take.
A row that may see no key, as padding on the left, becomes zeros, where a model's own additive mask gives the
mean of all values: nothing reads that row but a label on padding.

Mirrors ``sdpa_attention_forward`` and ``masking_utils`` of transformers, and ``eager_attention_forward`` of
its Llama, Gemma 2 and GPT-OSS.
"""

import operator
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import canonical, value_of
from rewriter.checkpoint import Checkpoints
from rewriter.fusion import Applied, CrossingPass
from rewriter.kernels.attention import attention, attention_refusal
from rewriter.kernels.attention_unmasked import causal_attention, full_attention
from rewriter.mask_terms import MaskReader, MaskTerms, Unproven
from rewriter.match import Match, Miss
from rewriter.pattern import Unmet, require, rewrite, same, source_line
from rewriter.replace import arguments, find, insert, put_call, sweep


@dataclass(frozen=True)
class Operands:
    """What every way of writing attention comes down to; values are nodes and numbers of the graph."""

    q: Node
    k: Node
    v: Node
    mask: Node | None = None
    scale: Any = None
    dropout: Any = 0.0
    training: Any = True
    is_causal: bool = False
    enable_gqa: bool = False
    softcap: Any = 0.0
    sinks: Node | None = None


@rewrite(to=Operands)
def sdpa(q, k, v, mask, dropout, is_causal, scale, enable_gqa):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


@rewrite(to=Operands)
def eager(q, k, v, mask, scale, dropout, training):
    logits = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, dropout, training), v)


@rewrite(to=Operands)
def eager_softcapped(q, k, v, mask, scale, softcap, dropout, training):
    logits = torch.matmul(q, k.transpose(2, 3)) * scale
    logits = torch.tanh(logits / softcap) * softcap + mask
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, dropout, training), v)


@rewrite(to=Operands)
def eager_with_sinks(q, k, v, mask, scale, sinks, dropout, training):
    logits = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([logits, sink], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True)[0]
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, dropout, training).to(v.dtype), v)


REWRITES = (sdpa, eager_with_sinks, eager_softcapped, eager)
ANCHORS = ("scaled_dot_product_attention", "softmax")


@dataclass(frozen=True)
class _Replacement:
    """A call in a match's place; ``nodes`` are those that it makes superfluous beside the match's own."""

    to: Callable
    args: tuple
    kwargs: dict[str, Any]
    nodes: frozenset[Node]


@dataclass
class _Attentions:
    """The attentions of one module, rewritten graph by graph.

    ``rows`` are masks and document numbers that were brought to the shape (batch or 1, tokens), shared by all
    layers.
    """

    checkpoints: Checkpoints
    reader: MaskReader
    rows: dict[Node, Node] = field(default_factory=dict)

    def rewrite(self, graph: Graph) -> Applied:
        effects = self.checkpoints.effects[graph]
        found = find(graph, REWRITES, ANCHORS, effects)
        applied = Applied(misses=[miss for miss in found.misses if _is_attention(miss)])
        for match in found.matches:
            place = source_line(match.root)
            try:
                with effects.entered(match.root):
                    new = self._replacement(match)
            except (Unmet, Unproven) as reason:
                applied.misses.append(Miss(match.rewrite, str(reason), match.nodes, match.root, None))
                continue
            if new is None:
                continue
            match = replace(match, nodes=match.nodes | new.nodes)
            outcome = put_call(graph, match, new.to, new.args, new.kwargs, effects)
            if isinstance(outcome, Miss):
                applied.misses.append(outcome)
            else:
                applied.add(match, place)
        return applied

    def _replacement(self, found: Match) -> _Replacement | None:
        """The call to put in; None where the graph's own is as good.

        Raises:
            Unmet, Unproven: with the reason why there is none.
        """
        args, kwargs = arguments(found)
        it = Operands(*args, **kwargs)
        require(all(value_of(x).dim() == 4 for x in (it.q, it.k, it.v)), "q, k and v are not of 4 dimensions")
        scale = None if it.scale is None else _number(it.scale, "scale")
        softcap = _number(it.softcap, "softcap")
        dropout = _number(it.dropout, "dropout") if it.training else 0.0
        terms = self._terms(it)
        k, v, repeats = self._unrepeated(found, it)
        is_plain = not softcap and it.sinks is None and terms in (MaskTerms(), MaskTerms(causal=True))
        if is_plain and it.mask is None and not repeats and not it.enable_gqa:
            return None
        if is_plain:
            to = causal_attention if terms.causal else full_attention
            return _Replacement(to, (it.q, k, v, scale, dropout), {}, repeats)
        require(not dropout, f"dropout {dropout} of the weights needs a mask that is causal and nothing else")
        _check_kernel(it, k, v, terms, scale)
        given = {
            "window": terms.window,
            "chunk": terms.chunk,
            "segments": self._row(terms.segments, found.root.graph),
            "key_mask": self._row(terms.key_mask, found.root.graph),
            "sinks": it.sinks,
            "softcap": softcap,
        }
        kwargs = {"scale": scale, "causal": terms.causal, **{n: x for n, x in given.items() if x}}
        return _Replacement(attention, (it.q, k, v), kwargs, repeats)

    def _terms(self, it: Operands) -> MaskTerms:
        terms = MaskTerms(causal=it.is_causal) if it.mask is None else self.reader.read(it.mask)
        if not terms.causal and not terms.chunk and terms.segments is None:
            return terms
        tokens, keys = value_of(it.q).shape[2], value_of(it.k).shape[2]
        require(same(tokens, keys), f"{tokens} queries and {keys} keys have no common positions")
        # Comparing a symbolic length makes the outcome a condition of this graph, on purpose: up to the
        # window attention is purely causal and much cheaper, and lengths on one side share one compilation.
        window = terms.window if terms.window and tokens > terms.window else 0
        chunk = terms.chunk if terms.chunk and tokens > terms.chunk else 0
        return replace(terms, window=window, chunk=chunk)

    def _unrepeated(self, found: Match, it: Operands) -> tuple[Node, Node, frozenset[Node]]:
        """K and V before they were repeated for grouped queries, and the nodes that repeated them."""
        key, value = _repeated(it.k), _repeated(it.v)
        if key is None or value is None or not same(_heads(key[0]), _heads(value[0])):
            return it.k, it.v, frozenset()
        nodes = key[1] | value[1]
        effects, matched = self.checkpoints.effects[found.root.graph], set(nodes | found.nodes)
        reason = effects.mode_border(matched) or effects.overwritten(matched, {key[0], value[0]}, found.root)
        require(reason is None, str(reason))
        return key[0], value[0], nodes

    def _row(self, node: Node | None, graph: Graph) -> Node | None:
        """``node``, (batch or 1, tokens) or (batch or 1, 1, 1, tokens), as the former, in ``graph``."""
        if node is None:
            return None
        if value_of(node).dim() == 4 and node not in self.rows:
            following, index = node.next, (slice(None), 0, 0, slice(None))
            row = value_of(node)[index]
            row = insert(node.graph, following, operator.getitem, (node, index), {}, row, node)
            self.checkpoints.effects[node.graph].put(row, following)
            self.rows[node] = row
        return self.checkpoints.bring(self.rows.get(node, node), graph)


def _check_kernel(it: Operands, k: Node, v: Node, terms: MaskTerms, scale: float | None) -> None:
    """State what ``attention`` takes; to be called under the autocast state of the match."""
    tensors = [value_of(x) for x in (it.q, k, v)]
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [torch.empty_like(x, dtype=dtype) for x in tensors]
    reason = attention_refusal(*tensors)
    require(reason is None, str(reason))
    require(scale is None or scale >= 0, f"the scale {scale} is negative")
    sinks = value_of(it.sinks)
    require(sinks is None or same(tuple(sinks.shape), (_heads(it.q),)), "the sinks are not one number a head")


def _number(value: Any, name: str) -> float:
    """A number of the graph as one of Python's; a symbolic one, as ``dynamic=True`` has, is fixed."""
    value = value_of(value)
    is_known = value.node.has_hint() if isinstance(value, torch.SymFloat) else isinstance(value, (int, float))
    require(is_known, f"the {name} {value} is no constant")
    return float(value)


def _heads(node: Node) -> Any:
    return value_of(node).shape[1]


def _repeated(node: Node) -> tuple[Node, frozenset[Node]] | None:
    """What ``node`` repeats along the heads, each head several times in a row, and the nodes that do so.

    Either ``repeat_interleave``, or a new axis behind the heads' that is expanded and merged into them.
    """
    nodes: list[Node] = []

    def step(node: Any, *names: str) -> tuple | None:
        call = canonical(node) if isinstance(node, Node) else None
        while call is not None and call.name == "alias":
            nodes.append(node)
            node = call.args[0]
            call = canonical(node)
        if call is None or call.name not in names:
            return None
        nodes.append(node)
        return call.args

    merged = step(node, "reshape", "view", "flatten")
    expanded = step(merged[0], "expand", "broadcast_to") if merged else None
    inserted = step(expanded[0], "getitem", "unsqueeze") if expanded else None
    if merged is None or expanded is None or inserted is None:
        return None
    source = inserted[0]
    before, widened, after = (tuple(value_of(n).shape) for n in (source, expanded[0], merged[0]))
    if len(before) != 4 or len(after) != 5 or value_of(node).dim() != 4:
        return None
    batch, heads, tokens, dim = before
    times = after[2]
    grouped = isinstance(heads, int) and isinstance(times, int)
    shapes = ((batch, heads, 1, tokens, dim), (batch, heads, times, tokens, dim))
    whole = grouped and (batch, heads * times, tokens, dim)
    if not grouped or not same((widened, after, tuple(value_of(node).shape)), (*shapes, whole)):
        return None
    return source, frozenset(nodes)


def _is_attention(miss: Miss) -> bool:
    """Whether a miss is about attention: the softmax over a router's experts, of fewer dimensions, is not."""
    nodes = {*miss.matched, miss.node} - {None}
    calls = [(n, canonical(n)) for n in nodes]
    anchors = [(n, call) for n, call in calls if call is not None and call.name in ANCHORS]
    return any(call.name != "softmax" or getattr(value_of(n), "ndim", 4) == 4 for n, call in anchors)


def rewrite_attention(module: GraphModule) -> Applied:
    """Rewrite the attentions of ``module`` and of the checkpoint bodies in it."""
    checkpoints = Checkpoints.of(module)
    attentions = _Attentions(checkpoints, MaskReader(checkpoints))
    whole = Applied()
    for part in checkpoints.graphs:
        with ExitStack() as modes:
            for call in reversed(list(checkpoints.callers(part.graph))):
                modes.enter_context(checkpoints.effects[call.graph].entered(call))
            whole.extend(attentions.rewrite(part.graph))
        sweep(part)
        checkpoints.drop_unread(part.graph)
        part.recompile()
    return whole


attention_pass = CrossingPass("attention", rewrite_attention)
