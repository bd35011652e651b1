"""Parts a region into stages: row-wise ones, which can run in tiles of the sequence, and whole ones between.

    layer(h, cos, sin, weights) -> h'
      row-wise   norm, projections, rotary                    h -> q, k, v
      whole      attention                                    q, k, v -> out
      row-wise   projection, residual, norm, MLP, residual    out, h -> h'

Stages alternate along the dataflow, each as large as it can be. Row-wise work runs as late as what reads it
allows: an MLP beside attention then reads the layer's input after it instead of handing its result past it.
What depends on weights and tables alone is done again in each stage that reads it.

Whole too: row-wise work between two whole stages that multiplies by no weight, as a softmax written out: to
part it would hand all scores from stage to stage. Refused, and left as one whole stage: a tensor written in
place after another stage has made or read it; a result that is no tensor and that another stage reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from rewriter.canonical import value_of
from rewriter.effects import Effects
from rewriter.memory.named_sizes import with_named_sizes
from rewriter.memory.rows import Tokens, tokens_of
from rewriter.memory.stage_module import operands, stage_module
from rewriter.regions.program import Region
from rewriter.rowwise.rules import PRODUCTS
from rewriter.signatures import target_name


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a region.

    Attributes:
        module: takes the stage's inputs and returns a tuple of its results; that of a row-wise stage takes
            tiles of any length.
        inputs, outputs: nodes of the region's graph, in the module's order.
        rows_in, rows_out: of each, the dimension that counts tokens; None where it does not depend on them,
            and everywhere in a whole stage.
        reason: what a whole stage is whole for; empty in a row-wise one.
    """

    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    rows_in: tuple[int | None, ...]
    rows_out: tuple[int | None, ...]
    reason: str = ""

    @property
    def row_wise(self) -> bool:
        """Whether it can run in tiles of the sequence."""
        return any(rows is not None for rows in self.rows_in)


class _Inseparable(Exception):
    """Why a region is one stage."""


def stages(region: Region) -> tuple[Stage, ...]:
    """The stages of ``region``, in the order in which they run."""
    module, originals = with_named_sizes(region.module)
    tokens = tokens_of(module.graph)
    effects = Effects.of(module.graph, torch.is_grad_enabled())
    _keep_written_together(tokens, effects)
    try:
        parts = _parted(module, tokens, effects)
    except _Inseparable as reason:
        return (_only(region, str(reason)),)
    return tuple(
        replace(
            part,
            inputs=tuple(originals[n] for n in part.inputs),
            outputs=tuple(originals[n] for n in part.outputs),
        )
        for part in parts
    )


def _only(region: Region, reason: str) -> Stage:
    graph = region.module.graph
    (output,) = graph.find_nodes(op="output")
    inputs, outputs = tuple(graph.find_nodes(op="placeholder")), tuple(output.args[0])
    return Stage(region.module, inputs, outputs, (None,) * len(inputs), (None,) * len(outputs), reason)


def _parted(module: GraphModule, tokens: Tokens, effects: Effects) -> tuple[Stage, ...]:
    (output,) = module.graph.find_nodes(op="output")
    results = [n for n in output.args[0] if isinstance(n, Node)]
    if not tokens.rulings:
        raise _Inseparable(_reasons(tokens, tokens.mixing) or "it reads no activations")
    for node in results:
        if node in tokens.given:
            tokens.make(node)
    level = _levels(tokens, results)
    order = sorted(set(level.values()))
    parts = [_with_given([n for n in level if level[n] == k], tokens, effects) for k in order]
    _refuse_writes_across(parts, effects)
    made = {node: i for i, part in enumerate(parts) for node in part if node not in tokens.given}
    reads = [_reads(part, tokens if k % 2 == 0 else None) for k, part in zip(order, parts, strict=True)]
    read = {node for inputs in reads for node in inputs}
    found = []
    for k, part, inputs in zip(order, parts, reads, strict=True):
        outputs = [n for n in part if n in made and (n in results or n in read)]
        _refuse_what_cannot_cross(inputs, made)
        row_wise = k % 2 == 0
        rows = tokens.rows if row_wise else {}
        found.append(
            Stage(
                stage_module(module, part, inputs, outputs, effects, tokens if row_wise else None),
                tuple(inputs),
                tuple(outputs),
                tuple(rows.get(n) for n in inputs),
                tuple(rows.get(n) for n in outputs),
                "" if row_wise else _reasons(tokens, part) or "what it reads is whole",
            )
        )
    return tuple(found)


def _keep_written_together(tokens: Tokens, effects: Effects) -> None:
    """What one operation writes for all tokens, no tile may make."""
    for storage, writes in effects.writes.items():
        sharing = effects.sharing[storage]
        if any(n in tokens.mixing for n in (*sharing, *writes)):
            for node in sharing:
                if tokens.rulings.pop(node, None):
                    tokens.mixing[node] = ""


def _reads(part: Sequence[Node], tokens: Tokens | None) -> list[Node]:
    """What ``part`` reads from outside, numbers first."""
    inside = set(part)
    found = dict.fromkeys(s for n in part for s in operands(n, tokens) if s not in inside)
    return sorted(found, key=lambda n: isinstance(value_of(n), Tensor))


def _reasons(tokens: Tokens, nodes: Iterable[Node]) -> str:
    said = (f"`{n.name}`: {why}" for n in nodes if (why := tokens.mixing.get(n)))
    return "; ".join(dict.fromkeys(said))


def _levels(tokens: Tokens, results: Sequence[Node]) -> dict[Node, int]:
    """The stage of each operation that depends on tokens: even ones are row-wise, odd ones whole."""
    while True:
        level = _earliest(tokens)
        first, last = min(level.values()), max(level.values())
        products = {k for n, k in level.items() if target_name(n) in PRODUCTS}
        between = {k for k in level.values() if k % 2 == 0 and first < k < last} - products
        if not between:
            return _latest(tokens, level, results)
        for node in [n for n in level if level[n] in between]:
            del tokens.rulings[node]
            tokens.mixing[node] = ""


def _earliest(tokens: Tokens) -> dict[Node, int]:
    level: dict[Node, int] = {}
    graph = next(iter(tokens.rulings)).graph
    for node in graph.nodes:
        if node not in tokens.rulings and node not in tokens.mixing:
            continue
        odd = node not in tokens.rulings
        after = max((level[s] for s in node.all_input_nodes if s in level), default=-1 if odd else 0)
        level[node] = after + (after % 2 != odd)
    return level


def _latest(tokens: Tokens, earliest: dict[Node, int], results: Sequence[Node]) -> dict[Node, int]:
    """Row-wise operations as late as their readers allow; the elements of a tuple stay with it."""
    last = max((k for k in earliest.values() if k % 2 == 0), default=0)
    ends = set(results)
    level: dict[Node, int] = {}
    for node in reversed(earliest):
        if node not in tokens.rulings:
            level[node] = earliest[node]
            continue
        readers = [level[u] for u in node.users if u in level]
        readers += [last] if node in ends else []
        latest = min(readers, default=earliest[node])
        level[node] = max(latest - latest % 2, earliest[node])
    for node in earliest:
        for source in node.all_input_nodes:
            if source in level and isinstance(value_of(source), (tuple, list)):
                level[node] = level[source]
    return {node: level[node] for node in earliest}


def _with_given(part: Sequence[Node], tokens: Tokens, effects: Effects) -> list[Node]:
    """``part`` and what it reads of what depends on no token, in the graph's order."""
    inside, waiting = set(part), list(part)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in inside and (source in tokens.given or source.op == "get_attr"):
                inside.add(source)
                waiting.append(source)
    return sorted(inside, key=effects.position.__getitem__)


def _refuse_writes_across(parts: Sequence[Sequence[Node]], effects: Effects) -> None:
    """A tensor may be written in one stage, and read there and later, in the order that the region has."""
    homes: dict[Node, list[int]] = {}
    for index, part in enumerate(parts):
        for node in part:
            homes.setdefault(node, []).append(index)
    for storage, writes in effects.writes.items():
        sharing = effects.sharing[storage]
        touching = {*sharing, *(user for node in sharing for user in node.users)}
        for write in writes:
            for node in touching:
                for home in homes.get(node, []):
                    (own, *more) = homes.get(write, [home])
                    later = effects.position[node] > effects.position[write]
                    if more or home < own or (home > own and (not later or node in writes)):
                        raise _Inseparable(f"`{write.name}` writes in place into what other stages read")


def _refuse_what_cannot_cross(inputs: Sequence[Node], made: dict[Node, int]) -> None:
    for node in inputs:
        if node in made and not isinstance(value_of(node), (Tensor, SymInt)):
            raise _Inseparable(f"`{node.name}` is no tensor, and several stages read it")
