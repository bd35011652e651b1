"""Numbers that each layer has for itself are constants where they are equal: so the layers are of one kind.

    x0 * a.item() ... x1 * b.item()   with a = b = 0.22   ->   x0 * 0.22 ... x1 * 0.22, with guards on both

With ``dynamic=True`` Dynamo makes a symbol of every float that it meets: a multiplier of Granite's residual
stream is another one in each layer, and compiled code of one layer would not know the other's number. Where
floats are equal, guards are asked for that they stay what they are. Dynamo then traces anew, once, with
constants, as it has them without ``dynamic=True``, and compiles anew where one is another: a number that
changes every few steps, alike in all layers, is better kept in a tensor.

Left as they are: symbols without ``dynamic=True``, since those are numbers that were seen to change; numbers
of a graph that computes others of them (GPT-J's root of 2/π), since regions would save some for a backward,
which Inductor refuses; and those that more than sums and products of tensors read.
"""

import torch
from torch import SymFloat
from torch.fx import Graph

from rewriter.canonical import value_of
from rewriter.signatures import target_name

_ARITHMETIC = ("add", "sub", "mul", "div")


def hold_equal_numbers(graph: Graph) -> None:
    """Ask for guards on the floats of ``graph`` that are equal now and that the same operations read."""
    numbers = [node for node in graph.nodes if isinstance(value_of(node), SymFloat)]
    were_seen_to_change = torch._dynamo.config.assume_static_by_default
    if were_seen_to_change or any(node.target != "item" for node in numbers):
        return
    equal: dict[tuple, list[SymFloat]] = {}
    for node in numbers:
        number, readers = value_of(node), tuple(target_name(user) for user in node.users)
        if number.node.expr.is_Symbol and number.node.has_hint() and set(readers) <= set(_ARITHMETIC):
            equal.setdefault((number.node.hint, readers), []).append(number)
    for (hint, _), members in equal.items():
        for number in members if len(members) > 1 else ():
            bool(number == hint)  # Asking is the guard.
