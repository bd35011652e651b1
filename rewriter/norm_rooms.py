"""Norms that write their rows with room beside them, where ``extended`` would copy them to have it.

    y = rms_norm(...)                            wide = rms_norm(..., room);  y = wide[..., :inner]
    u = y Aᵀ                              ->     u = y Aᵀ
    [y | u | 0] = extended(y, [u], room)         fill_columns_(wide, [u], room)

The copy reads and writes a hidden state for some columns more. Without it that state is written once, and
one less lives at that moment. A forward has it before gate and up; a backward before down, where a norm's
gradient is that of the MLP's result. Who else reads ``y`` reads rows with gaps, and who saves it for a
backward keeps the room with it, 1.6% of 4,096 columns.

A pass over graphs after autograd, where ``y`` has no history. Left as they are: rows that no norm wrote, or
that were cast since; rows that something writes to, or that the graph's caller or an op of another library
gets; and rows of which there are views that gaps do not allow.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter.kernels import rms_norm as _defines_the_ops  # noqa: F401
from rewriter.kernels.extended_product import fill_columns_
from rewriter.memory.operations import written_by

_ops, _aten = torch.ops.rewriter, torch.ops.aten
# The first result of each is rows.
_NORMS = (_ops.rms_norm.default, _ops.add_rms_norm.default, _ops.rms_norm_backward.default)
_REGROUPED = (_aten.view.default, _aten._unsafe_view.default)
# Views of any strides.
_VIEWS = (_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.slice.Tensor)


def leave_rooms(graph: Graph, *, functional: bool, returned: int | None = None) -> None:
    """Let norms in ``graph`` leave the room that ``extended`` would copy their rows for.

    Args:
        graph: of ATen's and our ops, with fake values (``"val"``).
        functional: for a graph in which nothing is written, as AOTAutograd hands it to a compiler: what fills
            the room is said in PyTorch's way. Else a node writes.
        returned: how many of the graph's results its caller gets; those behind them are saved for a backward.
            None for all.
    """
    for copy in graph.find_nodes(op="call_function", target=_ops.extended.default):
        made = _made_by_norm(copy.args[0])
        views = None if made is None else _views_of(made)
        if views is not None and _may_have_gaps(views, copy, returned):
            _leave_room(copy, views, functional)


def _made_by_norm(rows: Any) -> Node | None:
    """What ``rows`` are a view of, if a norm made it and its rows are the same."""
    while _regroups(rows):
        rows = rows.args[0]
    if rows.target is not operator.getitem or rows.args[1] != 0 or rows.args[0].target not in _NORMS:
        return None
    return rows if isinstance(_width(rows), int) else None


def _regroups(node: Any) -> bool:
    """Whether it is a view with the same rows."""
    return node.target in _REGROUPED and _width(node) == _width(node.args[0])


def _views_of(rows: Node) -> list[Node] | None:
    """``rows`` and all views of them, in order; None where one of them takes rows without gaps."""
    whole, views = {rows}, [rows]
    for source in views:
        for user in source.users:
            if source in whole and _regroups(user):
                whole.add(user)
            elif user.target not in _VIEWS:
                if _is_view(user):
                    return None
                continue
            views.append(user)
    return sorted(views)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return aliases or node.target in _REGROUPED


def _may_have_gaps(views: Sequence[Node], copy: Node, returned: int | None) -> bool:
    """Whether the graph's caller gets none of them, nothing writes to them, and readers take any strides."""
    values = {*views, copy}
    (output,) = copy.graph.find_nodes(op="output")
    given: Any = output.args[0]
    if not values.isdisjoint(given[:returned]):
        return False
    readers = {user for value in values for user in value.users} - {output}
    return all(
        getattr(reader.target, "namespace", "") in ("aten", "prims", "rewriter")
        and values.isdisjoint(written_by(reader))
        for reader in readers
    )


def _leave_room(copy: Node, views: Sequence[Node], functional: bool) -> None:
    graph, wide, inner = copy.graph, views[0], _width(views[0])
    (rows, columns, room), (norm, _) = _arguments(copy), _arguments(wide)
    shape = None if rows is wide else [*rows.args[1][:-1], inner + room]
    norm.kwargs = {"room": room}
    for node in (norm, wide):
        node.meta["val"] = _value(node)
    for node in (norm, *(reader for view in views for reader in view.users)):
        # What a compiler would bring operands to.
        node.meta.pop("eager_input_vals", None)
    with graph.inserting_after(wide):
        first = _call(graph, _aten.slice.Tensor, wide, -1, 0, inner)
    wide.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    with graph.inserting_before(copy):
        if functional:
            wide = _filled(wide, [first, *views[1:]], copy)
        else:
            graph.call_function(fill_columns_, (wide, columns, room))
        if shape is not None:
            wide = _call(graph, _aten.view.default, wide, shape)
    copy.replace_all_uses_with(wide)
    graph.erase_node(copy)


def _filled(wide: Node, views: Sequence[Node], copy: Node) -> Node:
    """``wide`` with columns, as a value of its own, of which later readers have ``views``.

    Else both would have to be there.
    """
    graph, (_, columns, room) = copy.graph, _arguments(copy)
    given = {"wide": wide, "columns": columns, "room": room}
    fill = graph.call_function(torch.ops.higher_order.auto_functionalized, (fill_columns_,), given)
    fill.meta["val"] = (None, torch.empty_like(wide.meta["val"]))
    again = {wide: _call(graph, operator.getitem, fill, 1)}
    for view in views:
        if view < copy:
            again[view] = graph.node_copy(view, lambda n: again.get(n, n))
    for view, same in again.items():
        for reader in [user for user in view.users if copy < user]:
            reader.replace_input_with(view, same)
    return again[wide]


def _call(graph: Graph, function: Any, *args: Any) -> Node:
    node = graph.call_function(function, args)
    node.meta["val"] = _value(node)
    return node


def _value(node: Node) -> Any:
    function: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return function(*args, **kwargs)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _width(node: Any) -> Any:
    return node.meta["val"].shape[-1]
