"""Products that add in place (``add_product_``, ``fold_columns_``) in the graphs of a stage.

    add_product_(total, left, right)   ->  added = addmm(total, left, right), which later readers read
    fold_columns_(wide, rows)          ->  added = addmm(wide's first columns, its next ones, rows)

A backward that computes its forward again has both, and writes in place as the model does. Where forward and
backward are parted, nodes are copied to both, and a write has to be a value like any other; once parted, what
was added to in place and is read by nobody else is again. A compiler would copy it first.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from rewriter.kernels.add_product import add_product_
from rewriter.kernels.extended_product import fold_columns_

_ADDS = (add_product_, fold_columns_)


class Inseparable(Exception):
    """Why forward and backward cannot be parted so that the backward reads what the forward saved."""


def adds_for_nobody(node: Node) -> bool:
    """Whether ``node`` adds in place to a product that nothing else reads."""
    if node.target not in _ADDS:
        return False
    total = node.args[0]
    assert isinstance(total, Node)
    return _is_owned(total) and all(u.target in _ADDS and u.args[0] is total for u in total.users)


def add_out_of_place(module: GraphModule) -> None:
    """What is added in place as a value of its own: the partitioner copies nodes, a write is one."""
    renamed: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        given = node.args
        node.args = map_arg(node.args, lambda n: renamed.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: renamed.get(n, n))
        if node.target not in _ADDS:
            continue
        # By the name that all readers know, however often it was added to.
        written = given[0]
        assert isinstance(written, Node)
        with module.graph.inserting_before(node):
            if node.target is add_product_:
                renamed[written] = _added(*node.args)
            else:
                renamed.update(_folded(node, written))
        module.graph.erase_node(node)
    module.recompile()


def add_in_place_again(module: GraphModule) -> None:
    """Undo ``add_out_of_place`` where nobody else reads what is added to, nor has it elsewhere."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
        total, left, right = node.args
        alpha = float(node.kwargs.get("alpha", 1.0))
        if node.kwargs.get("beta", 1) != 1 or total.meta["val"].shape != node.meta["val"].shape:
            continue
        if total in (left, right):
            # It would be read while it is written.
            continue
        if _is_owned(total) and list(total.users) == [node] and _lie_alike(total, node):
            with graph.inserting_before(node):
                graph.call_function(add_product_, (total, left, right, alpha))
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        elif (wide := _folds(node)) is not None:
            with graph.inserting_before(node):
                graph.call_function(fold_columns_, (wide, right, alpha))
                view = graph.call_function(total.target, total.args)
            view.meta["val"] = total.meta["val"]
            node.replace_all_uses_with(view)
            graph.erase_node(node)
            graph.erase_node(total)
    module.recompile()


def _is_owned(node: Any) -> bool:
    """Whether a node's operation has made its result, and nothing else lies in its memory yet."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(r.alias_info is None for r in schema.returns)


def _lie_alike(a: Node, b: Node) -> bool:
    """Whether two results have the same strides: readers may take views that other strides have not."""
    strides = (n.meta["val"].stride() for n in (a, b))
    return all(statically_known_true(x == y) for x, y in zip(*strides, strict=True))


def _folds(node: Node) -> Node | None:
    """The product whose columns ``node`` adds up, where nobody else reads the first of them."""
    total, left, right = node.args
    assert isinstance(total, Node) and isinstance(left, Node) and isinstance(right, Node)
    slice_ = torch.ops.aten.slice.Tensor
    if total.target is not slice_ or left.target is not slice_ or list(total.users) != [node]:
        return None
    wide = total.args[0]
    rank, inner = right.meta["val"].shape
    reads = (total.args, left.args) == ((wide, 1, 0, inner), (wide, 1, inner, inner + rank))
    if not reads or not isinstance(wide, Node) or not _is_owned(wide):
        return None
    others = [n for n in wide.users if n is not total and not (n.target in _ADDS and n < node)]
    beside = all(n.target is slice_ and n.args[1] == 1 and n.args[2] >= inner for n in others)
    # With gaps between its rows it is for readers inside: a result would be copied, and keep all of it.
    given = any(n.op == "output" for n in node.users)
    return wide if beside and not given else None


def _added(total: Any, left: Any, right: Any, alpha: Any) -> Node:
    added = total.graph.call_function(torch.ops.aten.addmm.default, (total, left, right), {"alpha": alpha})
    added.meta["val"] = total.meta["val"]
    return added


def _folded(node: Node, written: Node) -> dict[Node, Node]:
    """Of a ``fold_columns_``: each later view of the columns that it writes, and what they are then.

    Args:
        written: what readers call the value that is written.
    """
    wide, rows, scale = node.args
    assert isinstance(wide, Node) and isinstance(rows, Node)
    rank, inner = rows.meta["val"].shape
    slice_ = torch.ops.aten.slice.Tensor
    views = [n for n in node.graph.nodes if n > node and written in n.all_input_nodes]
    if any(n.target is not slice_ or n.args != (written, 1, 0, inner) for n in views):
        raise Inseparable("what a product was added to in place is read otherwise than it was written")
    parts = []
    for start, end in ((0, inner), (inner, inner + rank)):
        part = node.graph.call_function(slice_, (wide, 1, start, end))
        part.meta["val"] = wide.meta["val"][:, start:end]
        parts.append(part)
    added = _added(parts[0], parts[1], rows, scale)
    return {view: added for view in views}
