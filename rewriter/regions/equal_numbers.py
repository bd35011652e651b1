"""Numbers that each layer has for itself are held equal where they are, so that the layers are of one kind.

    x0 * a.item() ... x1 * b.item()   with a = b = 0.22   ->   one symbol, and a guard that a = b

With ``dynamic=True`` Dynamo makes a symbol of every float that it meets: a multiplier of Granite's residual
stream is another one in each layer, and compiled code of one layer would not know the other's number. What is
held equal by a guard has one name and one value; where it no longer holds, Dynamo compiles anew, and layers
whose numbers differ are kinds of their own. Such numbers are constants of what is compiled, as they are
without ``dynamic=True``: one that changes every few steps, alike in all layers, is better kept in a tensor.

Left as they are: numbers of a graph that computes others of them (GPT-J's root of 2/π), since regions would
save some for a backward, which Inductor refuses; and those that more than sums and products of tensors read.
"""

from torch import SymFloat
from torch.fx import Graph

from rewriter.canonical import value_of
from rewriter.signatures import target_name

_ARITHMETIC = ("add", "sub", "mul", "div")


def hold_equal_numbers(graph: Graph) -> None:
    """Have one symbol for the floats of ``graph`` that are equal now and that the same operations read."""
    numbers = [node for node in graph.nodes if isinstance(value_of(node), SymFloat)]
    if any(node.target != "item" for node in numbers):
        return
    first: dict[tuple, SymFloat] = {}
    for node in numbers:
        number, readers = value_of(node), tuple(target_name(user) for user in node.users)
        if number.node.expr.is_Symbol and number.node.has_hint() and set(readers) <= set(_ARITHMETIC):
            one = first.setdefault((number.node.hint, readers), number)
            if one is not number:
                bool(one == number)  # Asking is the guard.
