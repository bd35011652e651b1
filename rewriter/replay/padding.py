"""Which inputs of a graph are padded, with what, and which results are cut, so that padding has no effect.

``padding_of`` takes the graph that will be compiled, finds the length that all inputs of tokens share, and
proves with ``rewriter.replay.tokens`` that a longer input with padding behind its last token gives the same
loss and, cut, the same results. Labels are padded with the loss's ``ignore_index``, everything else with its
last token, whose id and position exist in every table. A tensor that is both ids and labels is made two
inputs, since the two are padded differently.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import value_of
from rewriter.nested import duplicate
from rewriter.replay.arguments import Unproven
from rewriter.replay.rules import rule_of
from rewriter.replay.tokens import COPY, Abstract, Reader, Tokens
from rewriter.rowwise.sizes import expression, same
from rewriter.signatures import target_name

_LABEL_STEPS = frozenset(
    {"pad", "getitem", "view", "reshape", "flatten", "contiguous", "clone", "to", "long"}
)


@dataclass(frozen=True)
class PaddedInput:
    """Input ``position`` grows along axis 1; ``fill`` is what it grows by, None for its last token."""

    position: int
    fill: int | None


@dataclass(frozen=True)
class CutOutput:
    """Result ``position`` keeps, along ``axis``, the length of the call and ``offset``."""

    position: int
    axis: int
    offset: int


@dataclass(frozen=True)
class Padding:
    """How to run a graph on a longer input.

    Attributes:
        symbol: of the length, in the sizes that tracing saw.
        sizes: positions of the inputs that are the length.
    """

    symbol: sympy.Symbol
    sizes: tuple[int, ...]
    inputs: tuple[PaddedInput, ...]
    outputs: tuple[CutOutput, ...]


@dataclass
class Reading:
    """What is known of a graph as a whole.

    Attributes:
        values: what tracing knows of each input.
        doubled: positions of the original's inputs that it takes once more, behind all others, in order.
        unknown: why nothing is known of what it does, and it may not even be run twice; None if all is known.
        padding: None where ``unpaddable`` says why not, or the length is fixed.
        unpaddable: why padding is not proven to be without effect.
        draws: whether it draws random numbers, so that running it again gives something else.
        labels: positions of the inputs that are a loss's labels, each with the label that is ignored.
    """

    values: tuple[Any, ...]
    doubled: tuple[int, ...] = ()
    unknown: str | None = None
    padding: Padding | None = None
    unpaddable: str | None = None
    draws: bool = False
    labels: tuple[tuple[int, int], ...] = ()


def separate_labels(
    module: GraphModule, example_inputs: Sequence[Any]
) -> tuple[GraphModule, Sequence[Any], tuple[int, ...]]:
    """Give labels that are an input with other readers an input of their own, behind all others.

    Returns:
        the graph, ``module`` itself where nothing is to be done; its example inputs; and the positions of the
        inputs that it takes twice.
    """
    if not _shared_labels(module.graph):
        return module, example_inputs, ()
    module = duplicate(module)
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    examples, doubled = list(example_inputs), []
    for source, found in _shared_labels(graph).items():
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            labels = graph.placeholder(f"{source.name}_as_labels")
        labels.meta["example_value"] = value_of(source)
        for reader in found:
            reader.replace_input_with(source, labels)
        examples.append(_another(value_of(source), example_inputs))
        doubled.append(placeholders.index(source))
    return module, examples, tuple(doubled)


def _another(value: Tensor, example_inputs: Sequence[Any]) -> Tensor:
    """A tensor of its own, as lowering sees the others: two inputs that are one would be compiled as one."""
    with detect_fake_mode(example_inputs) or nullcontext():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def read(module: GraphModule, doubled: tuple[int, ...] = ()) -> Reading:
    """What is known of ``module``, as ``separate_labels`` left it."""
    placeholders = module.graph.find_nodes(op="placeholder")
    values = tuple(value_of(node) for node in placeholders)
    labels = {placeholders.index(source): ignored for source, _, ignored in _label_edges(module.graph)}
    reading = Reading(values, doubled, labels=tuple(labels.items()))
    try:
        reading.draws = _interpret(module.graph, None).draws
    except Unproven as reason:
        reading.unknown = str(reason)
        return reading
    try:
        symbol = _length(values)
        reading.padding = None if symbol is None else _padding(module.graph, symbol)
    except Unproven as reason:
        reading.unpaddable = str(reason)
    return reading


def _interpret(graph: Graph, symbol: sympy.Symbol | None, fills: dict[Node, int] | None = None) -> Reader:
    reader = Reader(symbol, rule_of)
    for node in graph.nodes:
        if node.op == "placeholder":
            reader.known[node] = _input(node, reader, (fills or {}).get(node))
        elif node.op in ("call_function", "call_method"):
            reader.known[node] = reader.read(node)
        elif node.op == "get_attr" and not isinstance(value_of(node), (Tensor, type(None))):
            raise Unproven(f"`{node.name}` is a graph of its own")
    return reader


def _input(node: Node, reader: Reader, fill: int | None) -> Abstract:
    value = value_of(node)
    if not isinstance(value, Tensor) or reader.symbol is None or not (axes := reader.axes(value)):
        return None
    if axes != [1] or expression(value.shape[1]) != reader.symbol:
        raise Unproven(
            f"input `{node.name}` of shape {tuple(value.shape)} has its tokens elsewhere than on axis 1"
        )
    if value.requires_grad:
        raise Unproven(f"input `{node.name}` needs a gradient")
    if not _is_dense(value):
        raise Unproven(f"input `{node.name}` has strides {value.stride()}")
    return Tokens(1, reader.symbol, COPY if fill is None else fill)


def _is_dense(value: Tensor) -> bool:
    stride = sympy.Integer(1)
    for size, found in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size != 1 and not same(found, stride):
            return False
        stride *= expression(size)
    return True


def _length(values: Sequence[Any]) -> sympy.Symbol | None:
    """The symbol of the inputs' axis of tokens, None where every size is fixed."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    symbols = {s for value in tensors for size in value.shape for s in expression(size).free_symbols}
    found = {expression(v.shape[1]) for v in tensors if v.dim() > 1 and isinstance(v.shape[1], SymInt)}
    if not symbols:
        return None
    lengths = [length for length in found if isinstance(length, sympy.Symbol)]
    if len(lengths) != len(found) or len(found) != 1:
        raise Unproven("no single length is shared by its inputs")
    return lengths[0]


def _padding(graph: Graph, symbol: sympy.Symbol) -> Padding:
    fills = {node: fill for node, _, fill in _label_edges(graph)}
    reader = _interpret(graph, symbol, fills)
    sizes, inputs = [], []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = value_of(node)
        if isinstance(value, SymInt) and symbol in expression(value).free_symbols:
            if expression(value) != symbol:
                raise Unproven(f"input `{node.name}` is {value}, not the length")
            sizes.append(position)
        if isinstance(value, Tensor) and reader.of(node) is not None:
            inputs.append(PaddedInput(position, fills.get(node)))
    outputs = [cut for position, leaf in enumerate(_results(graph)) for cut in _cut(position, leaf, reader)]
    return Padding(symbol, tuple(sizes), tuple(inputs), tuple(outputs))


def _results(graph: Graph) -> Sequence[Any]:
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    return results if isinstance(results, (tuple, list)) else (results,)


def _cut(position: int, leaf: Any, reader: Reader) -> Iterator[CutOutput]:
    if isinstance(value_of(leaf), SymInt):
        raise Unproven(f"result {position} is a size")
    tokens = reader.of(leaf)
    if tokens is None:
        return
    offset = sympy.expand(tokens.length - reader.symbol)
    if tokens.flat or not offset.is_Integer:
        raise Unproven(f"result {position}, `{leaf.name}`, has the tokens of several rows on one axis")
    yield CutOutput(position, tokens.axis, int(offset))


def _label_edges(graph: Graph) -> Iterator[tuple[Node, Node, int]]:
    """Inputs that reach a loss as its labels, who reads them, and the label that is ignored."""
    for node in graph.nodes:
        if target_name(node).rpartition(".")[2] != "linear_cross_entropy":
            continue
        reader, source = node, node.args[3]
        while source.op != "placeholder" and target_name(source) in _LABEL_STEPS:
            reader, source = source, source.args[0]
        if source.op == "placeholder":
            yield source, reader, node.kwargs.get("ignore_index", -100)


def _shared_labels(graph: Graph) -> dict[Node, list[Node]]:
    """Inputs that are labels and something else, with those who read them as labels."""
    readers: dict[Node, list[Node]] = {}
    for source, reader, _ in _label_edges(graph):
        readers.setdefault(source, []).append(reader)
    return {source: found for source, found in readers.items() if set(source.users) != set(found)}


def admits(padding: Padding, values: Sequence[Any], inputs: Sequence[Any], length: int) -> bool:
    """Whether a compiled graph may be run at ``length``: all its conditions on sizes hold there."""
    sizes = {expression(v): i for v, i in zip(values, inputs, strict=True) if isinstance(v, SymInt)}
    known = {symbol: size for symbol, size in sizes.items() if isinstance(symbol, sympy.Symbol)}
    known[padding.symbol] = length
    environment = _environment(values)
    bounds = environment.var_to_range.get(padding.symbol)
    if bounds is not None and not operator.le(bounds.lower, length) & operator.le(length, bounds.upper):
        return False
    return all(environment.replace(guard.expr).xreplace(known) == sympy.true for guard in environment.guards)


def conditions(values: Sequence[Any]) -> int:
    """How many conditions on sizes there are so far."""
    return len(_environment(values).guards)


def _environment(values: Sequence[Any]) -> Any:
    return next(v.node.shape_env for v in values if isinstance(v, SymInt))
