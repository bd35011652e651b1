"""Whether a value in another memory order than the graph's allows the views that the graph takes of it."""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.canonical import value_of


def broken_view(node: Node, value: torch.Tensor) -> Node | None:
    """The first view of ``node``, or of its views, that ``value`` in its place would not allow."""
    storage = value_of(node).untyped_storage()._cdata
    for user in node.users:
        seen = value_of(user)
        if not isinstance(seen, torch.Tensor) or seen.untyped_storage()._cdata != storage:
            continue
        try:
            view = _replayed(user, node, value)
        except (RuntimeError, ValueError):
            return user
        if broken := broken_view(user, view):
            return broken
    return None


def _replayed(user: Node, node: Node, value: torch.Tensor) -> torch.Tensor:
    args, kwargs = map_arg((user.args, user.kwargs), lambda n: value if n is node else value_of(n))
    with value.fake_mode:  # pyright: ignore[reportAttributeAccessIssue]  a FakeTensor's
        if user.op == "call_method":
            return getattr(args[0], str(user.target))(*args[1:], **kwargs)
        function: Any = user.target
        return function(*args, **kwargs)
