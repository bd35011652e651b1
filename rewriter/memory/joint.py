"""A stage's forward and backward as graphs of plain functions: no autograd is left in them.

    forward(inputs) -> results                               of a stage that runs again in its backward
    backward(inputs, gradients of results) -> gradients of inputs

    forward(inputs) -> results, saved                        of one that saves what its backward reads
    backward(inputs, results, saved, gradients of results) -> gradients of inputs

In the first form the backward computes again what it reads, and nothing else: a product whose result only the
next stage reads, as an MLP's down projection, is not among it. The second form is for stages as attention,
whose forward is dear and whose result is small; PyTorch's min-cut partitioner says what to save.

Traced with fake tensors by ``make_fx``, after autograd and before Inductor's decompositions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from rewriter.draws_apart import keep_draws_apart
from rewriter.memory.fakes import densely, is_dense, memory_order
from rewriter.memory.in_place import Inseparable, add_out_of_place, adds_for_nobody
from rewriter.memory.size_sources import read_sizes_off_inputs, sized, with_arguments


@dataclass(frozen=True)
class Signature:
    """What a stage takes and gives, as fake tensors, and which of it has a gradient.

    Attributes:
        inputs: fake tensors without history, and sizes.
        needs: of each input, whether its gradient is wanted.
        results: fake tensors without history, and without gaps.
        differentiable: of each result, whether it depends on an input that needs a gradient.
    """

    inputs: tuple[Any, ...]
    needs: tuple[bool, ...]
    results: tuple[Any, ...]
    differentiable: tuple[bool, ...]

    @property
    def tangents(self) -> tuple[Any, ...]:
        """Like the gradients that the backward is given."""
        return tuple(r for r, has in zip(self.results, self.differentiable, strict=True) if has)


@dataclass(frozen=True)
class Saved:
    """What a backward graph takes beside gradients: places among the inputs, the results and the extras."""

    inputs: tuple[int, ...]
    results: tuple[int, ...]
    extras: int


def signature_of(module: Callable, inputs: Sequence[Any], needs: Sequence[bool]) -> Signature:
    """Run ``module`` on fake ``inputs`` and see what it gives. Call inside the inputs' fake mode."""
    with torch.enable_grad(), _numbers_forgotten(inputs):
        results = _results(module, _leaves(inputs, needs))
    flags = tuple(isinstance(r, Tensor) and r.requires_grad for r in results)
    plain = tuple(r.detach() if isinstance(r, Tensor) else r for r in results)
    return Signature(tuple(inputs), tuple(needs), plain, flags)


@contextmanager
def _numbers_forgotten(inputs: Sequence[Any]) -> Iterator[None]:
    """Numbers that are read off tensors inside are symbols of no graph: what traces next makes its own."""
    mode = detect_fake_mode(list(inputs))
    if mode is None or mode.shape_env is None:
        yield
        return
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        yield
    # Tensors remember the number that was read, until the next epoch.
    mode.epoch += 1


def forward_graph(module: Callable, signature: Signature) -> GraphModule:
    """The stage as a graph of ATen's and our own ops, without gradients."""

    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            return _results(module, inputs)

    return _pruned(make_fx(forward)(*signature.inputs))


def backward_graph(module: Callable, signature: Signature) -> GraphModule:
    """Gradients of the inputs that need one, from the inputs and the gradients of the results."""
    count = len(signature.inputs)

    def backward(*values: Any) -> Any:
        return _both(module, signature, values[:count], values[count:])[1]

    return _pruned(make_fx(backward)(*signature.inputs, *signature.tangents))


def partitioned_graphs(module: Callable, signature: Signature) -> tuple[GraphModule, GraphModule, Saved]:
    """Forward and backward of the second form; results come first, then what is saved of the inside.

    Raises:
        Inseparable: the stage writes to one of its inputs.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    keep_draws_apart()

    def joint(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        results, gradients = _both(module, signature, primals, tangents)
        return (*results, *gradients)

    given = (list(signature.inputs), list(signature.tangents))
    traced = _pruned(make_fx(joint)(*given))
    add_out_of_place(traced)
    if _writes(traced):
        traced = _without_writes(traced, *given)
    if writer := _writes(traced):
        raise Inseparable(f"`{writer}` writes to an input in place")
    _recompute_what_is_cheap(traced)
    _view_again(traced)
    # The partitioner goes by names that AOTAutograd gives.
    forward, backward = min_cut_rematerialization_partition(
        traced, [*signature.inputs, *signature.tangents], num_fwd_outputs=len(signature.results)
    )
    for graph in (forward, backward):
        # What compiles them would take the marks for its own.
        for node in graph.graph.nodes:
            for mark in _MARKS:
                node.meta.pop(mark, None)
    return _in_order(forward, backward, len(signature.inputs), len(signature.results))


# By which PyTorch's partitioner knows what to run again.
_MARKS = ("recompute", "ac_graph_id")
# Bound by memory: run again, they cost a read of their inputs and a write of their results.
_CHEAP = ("norm", "gate", "activation", "rotary")


def _recompute_what_is_cheap(module: GraphModule) -> None:
    """Our own pointwise kernels run again; the partitioner would save the result of any op it cannot fuse."""
    for node in module.graph.nodes:
        name = str(node.target)
        if name.startswith("rewriter.") and "backward" not in name and any(word in name for word in _CHEAP):
            _mark(node)


def _mark(node: Node) -> None:
    node.meta |= dict(zip(_MARKS, (CheckpointPolicy.MUST_RECOMPUTE, 0), strict=True))


def _view_again(module: GraphModule) -> None:
    """Views of inputs are taken again: saved, each would be one more tensor, and the same bytes.

    Where a size in them is that of no input, the backward could not read it off one.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    again = set(inputs)
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in _VIEWS or node.args[0] not in again:
            continue
        sizes = [n for n in node.all_input_nodes[1:] if isinstance(n.meta["val"], SymInt)]
        if all(sized(n.meta["val"], inputs) is not None for n in sizes):
            again.add(node)
            _mark(node)


_VIEWS = frozenset(
    {
        torch.ops.aten.transpose.int,
        torch.ops.aten.t.default,
        torch.ops.aten.view.default,
        torch.ops.aten.permute.default,
    }
)


def _leaves(inputs: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    return [x.detach().requires_grad_(True) if need else x for x, need in zip(inputs, needs, strict=True)]


def _results(module: Callable, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``module`` gives, without gaps: a slice would keep all of what it is a slice of.

    In PyTorch 2.11, matmul in C++ fails where lengths vary and the weight is frozen; that in Python does not.
    """
    with enable_python_dispatcher():
        given = module(*inputs)
    return tuple(
        densely(r, memory_order(r)) if isinstance(r, Tensor) and not is_dense(r) else r for r in given
    )


def _both(
    module: Callable, signature: Signature, inputs: Sequence[Any], tangents: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    with torch.enable_grad():
        leaves = _leaves(inputs, signature.needs)
        results = _results(module, leaves)
        wanted = [x for x, need in zip(leaves, signature.needs, strict=True) if need]
        roots = [r for r, has in zip(results, signature.differentiable, strict=True) if has]
        return results, torch.autograd.grad(roots, wanted, list(tangents), allow_unused=True)


def _pruned(module: GraphModule) -> GraphModule:
    """Without what nobody reads, and without ``detach``: each detached value would be one more to save."""
    read_sizes_off_inputs(module)
    for node in reversed(list(module.graph.nodes)):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        if not node.users and (not node.is_impure() or adds_for_nobody(node)):
            module.graph.erase_node(node)
    module.recompile()
    return module


def _without_writes(module: GraphModule, inputs: list[Any], gradients: list[Any]) -> GraphModule:
    """Each write in place to a value of its own, as AOTAutograd has it."""
    functional = torch.func.functionalize(module, remove="mutations")

    def joint(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return functional(primals, tangents)

    return _pruned(make_fx(joint)(inputs, gradients))


def _writes(graph: GraphModule) -> str | None:
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return node.name
    return None


def _in_order(
    forward: GraphModule, backward: GraphModule, inputs: int, results: int
) -> tuple[GraphModule, GraphModule, Saved]:
    """``backward``'s arguments in the order that ``Saved`` says, ``forward`` without what is given anyway."""
    (output,) = forward.graph.find_nodes(op="output")
    values = list(output.args[0])
    primals = {f"primals_{i + 1}": i for i in range(inputs)}
    made = {v.name: i for i, v in reversed(list(enumerate(values[:results]))) if isinstance(v, Node)}
    extras = [v for v in values[results:] if v.name not in primals and v.name not in made]
    taken = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    from_inputs = [name for name in taken if name in primals]
    from_results = [name for name in taken if name in made and name not in primals]
    tangents = [name for name in taken if name.startswith("tangents")]
    given = {*from_inputs, *from_results, *tangents}
    extras = [v for v in extras if v.name in taken and v.name not in given]
    sizes = [v for v in extras if not isinstance(v.meta["val"], Tensor)]
    extras = [v for v in extras if v not in sizes]
    forward.graph.erase_node(output)
    forward.graph.output((*values[:results], *extras))
    forward.recompile()
    order = [*from_inputs, *from_results, *(v.name for v in extras), *tangents]
    saved = Saved(tuple(primals[n] for n in from_inputs), tuple(made[n] for n in from_results), len(extras))
    return (
        forward,
        with_arguments(backward, [taken[n] for n in order], [taken[v.name] for v in sizes]),
        saved,
    )
