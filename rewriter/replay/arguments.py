"""The arguments of a call in order, for rules that know them by their place; and the refusal of a call."""

from torch.fx import Node

from rewriter.signatures import positional

# Keywords that say nothing about where elements come from.
_KEYWORDS = {"dtype", "device", "layout", "pin_memory", "requires_grad", "memory_format"}


class Unproven(Exception):
    """Why padding is not proven to be without effect, or why nothing is known of an operation."""


def refuse(node: Node, name: str, why: str) -> Unproven:
    return Unproven(f"`{node.name}`, {name.rpartition('.')[2]}, {why}")


def in_order(node: Node, name: str) -> tuple:
    """The arguments in order, without keywords where their order is not known.

    Raises:
        Unproven: a keyword may say where elements come from.
    """
    args = positional(name, node)
    if not node.kwargs or name.startswith("rewriter.") or args != (*node.args, *sorted(node.kwargs.items())):
        return args
    if not _KEYWORDS.issuperset(node.kwargs):
        raise refuse(node, name, f"has keywords {', '.join(node.kwargs)}")
    return node.args
