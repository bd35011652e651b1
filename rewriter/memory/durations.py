"""How long a graph runs: the sum of its kernels, each by what it computes or by what it moves.

A product takes its operations over the machine's rate, or its bytes over the bandwidth, whichever is more: a
narrow one, as of rank 32, is one of bytes. Other ops of ours, and of other libraries, take their bytes, a
weight from host memory those of the bus. Of pointwise operations a compiler makes one kernel for each chain:
what enters and leaves it is counted. No kernel is shorter than a launch, which counts where tiles are short.

Two kernels take both, one after the other in each block: attention, whose operations grow with the square of
the length and whose bytes do not, so that short sequences reach less of its rate; and the head's loss, which
reads a chunk's logits twice and writes their gradient between its products.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.memory.operations import (
    flops_of,
    int_hint,
    is_attention,
    is_attention_backward,
    is_by_groups,
    is_compiled,
    is_heads,
    is_view,
    name_of,
    readers_of,
    share_seen,
    source_of,
    written_by,
)

# Times that the head's loss reads or writes each of its logits, beside the products.
_PASSES = 3
# They read of an input only what they give.
_GATHERS = frozenset({"embedding", "index", "index_select", "gather", "select"})
# Bytes for each element of the queries that attention's backward writes and reads beside its arguments and
# results: their gradient in fp32, set to zero, added to and read.
_SUMMED = 12
# Operations that could run while a group of heads ends, which no longer fills the device, times the length:
# on an H200 0.2 ms a group at 20,000 tokens, 0.1 at 32,768, and what cannot be told from nothing at 50,000
# (``examples/benchmarks/attention_backward.py``).
_DRAINED = 2e15


class Rates(Protocol):
    """Of a machine: operations, bytes, and those of the bus a second; seconds between small kernels."""

    @property
    def matrix_flops(self) -> float: ...
    @property
    def attention_forward_flops(self) -> float: ...
    @property
    def attention_backward_flops(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...
    @property
    def to_device(self) -> float: ...
    @property
    def launch_seconds(self) -> float: ...


class Lengths(Protocol):
    """At which lengths a graph is costed."""

    def numel(self, value: Tensor) -> int: ...
    def bytes(self, value: Any) -> int: ...
    def amount(self, count: Any) -> int: ...
    def length(self, size: Any) -> int: ...


def duration(module: GraphModule, sizes: dict[Node, int], at: Lengths, rates: Rates) -> float:
    """Seconds of one run.

    Args:
        sizes: bytes that each node allocates.
    """
    launched = [n for n in sizes if not is_view(n) and _is_kernel(n)]
    kernels = [_kernel(n, sizes, at, rates) for n in launched if not _is_pointwise(n)]
    moved = (_moved_by_chain(c, sizes, at) for c in _chains(sizes))
    chains = [count / rates.bandwidth for count in moved if count]
    return sum(max(seconds, rates.launch_seconds) for seconds in (*kernels, *chains))


def _is_kernel(node: Node) -> bool:
    """Not what computes sizes."""
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list)) or bool(written_by(node))


def _kernel(node: Node, sizes: dict[Node, int], at: Lengths, rates: Rates) -> float:
    if is_attention(node):
        return _attention(node, sizes, at, rates)
    if name_of(node) == "host_weight":
        return sizes[node] / rates.to_device
    moving = _moved(node, sizes, at) / rates.bandwidth
    computing = flops_of(node, at.amount) / rates.matrix_flops
    if name_of(node) != "linear_cross_entropy":
        return max(computing, moving)
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    logits = at.bytes(x) // int_hint(x.shape[-1]) * int_hint(weight.shape[0])
    return max(computing, moving) + _PASSES * logits / rates.bandwidth


def _moved(node: Node, sizes: dict[Node, int], at: Lengths) -> int:
    """Bytes read and written; what is written in place, both."""
    if name_of(node) == "fill_columns_":
        # Of the wide rows it writes the room alone.
        return 2 * sum(at.bytes(column.meta["val"]) for column in node.all_input_nodes[1:])
    touched = (*node.all_input_nodes, *written_by(node))
    return sizes[node] + sum(at.bytes(n.meta.get("val")) for n in touched)


def _attention(node: Node, sizes: dict[Node, int], at: Lengths, rates: Rates) -> float:
    """Two products forward and five backward, of the pairs that are seen; heads may share keys."""
    backward = is_attention_backward(node)
    given = [n.meta["val"] for n in node.args if isinstance(n, Node) and is_heads(n)]
    query, key = given[1:3] if backward else given[:2]
    keys = at.length(key.shape[2])
    product = 2.0 * at.numel(query) * keys * share_seen(node, keys)
    moved = _moved(node, sizes, at) + (_SUMMED * at.numel(query) if backward else 0)
    computed = product * (5 if backward else 2)
    if is_by_groups(node):
        computed += _DRAINED / keys * (int_hint(key.shape[1]) - 1)
        moved += 2 * sizes[node]
    rate = rates.attention_backward_flops if backward else rates.attention_forward_flops
    return computed / rate + moved / rates.bandwidth


def _is_pointwise(node: Node) -> bool:
    return is_compiled(node) and not flops_of(node) and not is_attention(node)


def _chains(sizes: dict[Node, int]) -> Iterator[list[Node]]:
    """Pointwise operations that read each other, through views too."""
    chain_of: dict[Node, list[Node]] = {}
    for node in sizes:
        if is_view(node) or not _is_kernel(node) or not _is_pointwise(node):
            continue
        mine = [node]
        for source in map(source_of, node.all_input_nodes):
            other = chain_of.get(source)
            if other is not None and other is not mine:
                other += mine
                mine = other
                chain_of.update(dict.fromkeys(mine, mine))
        chain_of[node] = mine
    yield from {id(chain): chain for chain in chain_of.values()}.values()


def _moved_by_chain(chain: list[Node], sizes: dict[Node, int], at: Lengths) -> int:
    """Bytes that it reads of others, and writes for others."""
    inside = set(chain)
    read: dict[Node, int] = {}
    for node in chain:
        for given in node.all_input_nodes:
            if (source := source_of(given)) not in inside:
                # A value that is spread over many is read once.
                size = min(at.bytes(given.meta.get("val")), at.bytes(source.meta.get("val")) or 2**62)
                size = min(size, sizes[node]) if name_of(node) in _GATHERS else size
                read[source] = max(read.get(source, 0), size)
    written = (sizes[n] for n in chain if any(user not in inside for user in readers_of(n)))
    return sum(read.values()) + sum(written)
