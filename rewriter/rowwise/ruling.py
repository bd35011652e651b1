"""A ruling: how one operation treats the tokens of a sequence independently of each other.

An operation is row-wise along a dimension of its operands if a slice of its result, along some dimension of
that, is its result on slices of the operands:

    f(x, w)[:, a:b] == f(x[:, a:b], w)

A ruling says which operands are sliced where, and where then the result is. It goes by dimensions alone:
sizes that happen to be equal mean nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.rowwise.sizes import is_one

# The index of an argument and, where that is a sequence, of an element of it.
Place = tuple[int, ...]


class Mixes(Exception):
    """Why an operation is not row-wise.

    Attributes:
        gives: the dimension of its result that counts tokens, where that is known all the same.
    """

    def __init__(self, reason: str, gives: int | None = None):
        super().__init__(reason)
        self.gives = gives


@dataclass(frozen=True)
class Ruling:
    """How a node is row-wise.

    Attributes:
        gives: the dimension of its result, or of every tensor of a tuple.
        takes: of its operands, the dimension that is sliced; what is not here is read whole.
        size: the place in its arguments where the length of the sequence stands, which a tile's replaces.
    """

    gives: int
    takes: dict[Node, int | None] = field(default_factory=dict)
    size: Place | None = None


# The dimension of an operand that is known to count tokens, or None.
Rows = Callable[[Any], int | None]
Rule = Callable[[Node, Rows], Ruling]


def rank(x: Any) -> int:
    return value_of(x).dim()


def argument(node: Node, index: int, *names: str, default: Any = None) -> Any:
    """The argument at ``index``, or the keyword of one of ``names``."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[n] for n in names if n in node.kwargs), default)


def tensors_in(values: Iterable[Any]) -> list[Node]:
    return [x for x in values if isinstance(x, Node) and isinstance(value_of(x), Tensor)]


def result_rank(node: Node) -> int:
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        value = value[0]
    return value.dim()


def own_rows(x: Any, rows: Rows) -> int:
    """Where ``x``, the operand that matters, has its tokens."""
    found = rows(x) if isinstance(x, Node) else None
    if found is None:
        raise Mixes("it reads tokens beside its first operand")
    return found


def from_start(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def aligned(tensors: Sequence[Node], rows: Rows, ndim: int) -> Ruling:
    """The ruling of an operation that broadcasts ``tensors`` to ``ndim`` dimensions."""
    dims = {ndim - rank(x) + r for x in tensors if (r := rows(x)) is not None}
    if len(dims) != 1:
        raise Mixes("tokens meet in it" if dims else "it reads tokens beside its operands")
    (dim,) = dims
    takes: dict[Node, int | None] = {}
    for x in tensors:
        place = dim - (ndim - rank(x))
        takes[x] = place if place >= 0 and not is_one(value_of(x).shape[place]) else None
    return Ruling(dim, takes)
