"""A norm at the end of a layer to the beginning of the next: one hidden state crosses the border, not two.

    layer(h, normed) -> h + y, norm(h + y)      ->      layer(h) -> h + y, each with its own norm first

A fused sum and norm belongs to the layer that makes the sum, so that the next layer would keep, or send to
host memory, the sum and the normed sum. Parted, it keeps the sum alone, half of it, and normalises again in
its backward. It costs one more read of the sum: where memory does not ask for it, the fused form stays.
"""

import operator

from torch.fx import GraphModule, Node

from rewriter.kernels.layer_norm import add_layer_norm, layer_norm
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.nested import duplicate
from rewriter.regions.program import Program

_PARTED = {add_rms_norm: rms_norm, add_layer_norm: layer_norm}


def parted_at_borders(program: Program) -> GraphModule | None:
    """The program's graph with each fused norm that crosses a border parted; None where there is none."""
    crossing = {n.name for call in program.calls for n in call.outputs}
    source = duplicate(program.source)
    fused = [n for n in source.graph.nodes if n.target in _PARTED and _crosses(n, crossing)]
    for node in fused:
        _part(node)
    return source if fused else None


def _crosses(node: Node, crossing: set[str]) -> bool:
    """Whether both results do: the normed sum for the next layer's projections, the sum for its residual."""
    return sorted(str(u.args[1]) for u in node.users if u.name in crossing) == ["0", "1"]


def _part(node: Node) -> None:
    values = dict(zip(("x", "residual"), node.args, strict=False)) | node.kwargs
    x, residual = values["x"], values["residual"]
    rest = {name: value for name, value in node.kwargs.items() if name not in ("x", "residual")}
    graph = node.graph
    normed_value, sum_value = node.meta["example_value"]
    with graph.inserting_before(node):
        total = graph.call_function(operator.add, (x, residual))
        normed = graph.call_function(_PARTED[node.target], (total, *node.args[2:]), rest)
    for made, value in ((total, sum_value), (normed, normed_value)):
        made.meta = dict(node.meta, example_value=value)
    for reader in list(node.users):
        reader.replace_all_uses_with(total if reader.args[1] == 1 else normed)
        graph.erase_node(reader)
    graph.erase_node(node)
