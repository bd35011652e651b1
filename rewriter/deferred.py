"""Outputs of a graph that are computed when somebody first reads them.

A model returns its logits beside its loss, and a training step reads only the loss. Where the loss is fused,
the logits are the largest tensor of the step and made for nobody: a pass then puts a call of ``deferred`` in
their place. ``split_deferred`` takes these calls out of the graph, which returns their inputs instead (the
hidden states: hidden / vocabulary of the bytes), and wraps the compiled graph so that it still returns what
it did: a ``DeferredTensor`` for each, which knows shape, dtype and device, and computes its value at the
first read. A value is computed in the grad mode in which the model ran, so that gradients through it reach
what they reach without the rewrite.

A tensor whose inputs were changed in place before the first read, as by an optimizer's step, raises instead
of giving the logits of other weights. Changes that leave no mark in a tensor's version, as those of kernels
that write through a bare pointer, are not seen. Another compiled function cannot trace a ``DeferredTensor``:
Dynamo breaks the graph there, and under ``fullgraph=True`` raises; give it ``logits.clone()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from rewriter.nested import drop_unread_graphs, duplicate

_Compute = Callable[..., Tensor]


def deferred(head: _Compute, *inputs: Tensor) -> Tensor:
    """``head(*inputs)``: in a graph, marks a result that only the caller may need.

    ``head`` gives a tensor of ``(..., vocabulary)`` from ``inputs[0]``, ``(..., hidden)``, and ``inputs[1]``,
    ``(vocabulary, hidden)``.
    """
    return head(*inputs)


# What a wrapper knows without its value.
_ATTRIBUTES = (
    "shape dtype device ndim layout requires_grad grad_fn is_leaf itemsize nbytes "
    "is_cuda is_cpu is_sparse is_quantized is_meta is_nested"
)
_METHODS = (
    "size dim ndimension numel nelement stride element_size get_device __len__ "
    "is_floating_point is_complex is_contiguous is_inference"
)
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(Tensor, name) for name in _METHODS.split()]
)

# What is done to outputs that nobody reads, as accelerate's cast of all of them: the result is deferred too.
_STAYS_DEFERRED: dict[Callable, torch.dtype | None] = {
    Tensor.detach: None,
    Tensor.float: torch.float32,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.half: torch.float16,
}


class _Value:
    """``compute(*inputs)``, computed once; the inputs are let go then.

    ``origin``, a function and another value, is a shorter way: the function of that value.
    """

    def __init__(
        self,
        compute: _Compute,
        inputs: Sequence[Tensor],
        grad: bool,
        origin: tuple[Callable, _Value] | None = None,
    ):
        self.compute, self.grad, self.origin = compute, grad, origin
        self.inputs: tuple[Tensor, ...] = tuple(inputs)
        self.versions = [_version(t) for t in self.inputs]
        self.result: Tensor | None = None

    def read(self) -> Tensor:
        if self.result is None:
            self.result = self._computed(_Value.read)
            self.inputs, self.origin = (), None
        return self.result

    def fresh(self) -> Tensor:
        """The result without history, and not kept."""
        return self._computed(_Value.fresh) if self.result is None else self.result.detach()

    def _computed(self, ask: Callable[[_Value], Tensor]) -> Tensor:
        if self.origin is not None:
            function, first = self.origin
            return _run(function, [ask(first)], self.grad)
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            if _version(tensor) != version:
                raise RuntimeError(
                    f"deferred logits: an input of shape {tuple(tensor.shape)} was changed in place (version "
                    f"{_version(tensor)}, was {version}) before they were first read. Read them before the "
                    'optimizer\'s step, or compile with the pass "lm_head_loss" left out.'
                )
        return _run(self.compute, self.inputs, self.grad)


def _run(compute: _Compute, inputs: Sequence[Tensor], grad: bool) -> Tensor:
    """Run as recorded: in that grad mode, and with autocast off, whose casts ``compute`` holds."""
    device = inputs[0].device.type
    with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device, enabled=False):
        return compute(*inputs)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class DeferredTensor(Tensor):
    """A tensor of known shape, dtype and device whose value is computed when first read.

    Any function other than a question about metadata, a cast or ``detach`` is given the plain tensor in its
    place. Code that does not go through Python's overrides (C++, autograd functions) is served too: the
    wrapper is joined to the autograd graph by ``_Link``.
    """

    _value: _Value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _STAYS_DEFERRED and len(args) == 1 and not kwargs and args[0]._value.result is None:
            return _later(func, args[0])
        if func is Tensor.__hash__ or (func in _METADATA and args[0]._value.result is None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(DeferredTensor, _read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below autograd: the result has no history, so it is not the one to keep.
        args, kwargs = tree_map_only(DeferredTensor, _fresh, (args, kwargs or {}))
        return func(*args, **kwargs)


@torch.compiler.disable
def _read(tensor: DeferredTensor) -> Tensor:
    return tensor._value.read()


@torch.compiler.disable
def _fresh(tensor: DeferredTensor) -> Tensor:
    return tensor._value.fresh()


def _make(value: _Value, shape: Sequence[int], dtype: torch.dtype) -> DeferredTensor:
    if not value.grad:
        return _wrapper(value, shape, dtype)
    with torch.inference_mode(False), torch.enable_grad():
        return _Link.apply(value, shape, dtype, *value.inputs)


def _wrapper(value: _Value, shape: Sequence[int], dtype: torch.dtype) -> DeferredTensor:
    device = value.inputs[0].device
    tensor = Tensor._make_wrapper_subclass(DeferredTensor, tuple(shape), dtype=dtype, device=device)
    tensor._value = value
    return tensor


def _later(function: Callable, tensor: DeferredTensor) -> DeferredTensor:
    """``function(tensor)``, deferred; the product is computed once, whichever of the two is read first."""
    dtype = _STAYS_DEFERRED[function] or tensor.dtype
    if function is not Tensor.detach and dtype == tensor.dtype:
        return tensor
    first = tensor._value
    grad = tensor.requires_grad and function is not Tensor.detach and torch.is_grad_enabled()
    value = _Value(lambda *inputs: function(first.compute(*inputs)), first.inputs, grad, (function, first))
    return _make(value, tensor.shape, dtype)


class _Link(torch.autograd.Function):
    """Gives a wrapper its place in the autograd graph; the backward recomputes the value."""

    @staticmethod
    def forward(ctx, value, shape, dtype, *inputs):
        ctx.compute = value.compute
        ctx.save_for_backward(*inputs)
        return _wrapper(value, shape, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        needs = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs, strict=True)]
        result = _run(ctx.compute, inputs, True)
        found = iter(torch.autograd.grad(result, [t for t in inputs if t.requires_grad], gradient))
        return None, None, None, *(next(found) if need else None for need in needs)


@dataclass(frozen=True)
class _Place:
    """One deferred output: where it stands among the outputs, and where its inputs come from.

    ``sources`` are ("argument" | "result", index) into the graph's arguments or the lowered graph's results.
    """

    position: int
    head: GraphModule
    sources: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    grad: bool


def split_deferred(module: GraphModule) -> tuple[GraphModule, Callable[[Callable], Callable]]:
    """Take calls of ``deferred`` out of a graph.

    Returns:
        the graph to lower, ``module`` itself where it defers nothing; and a function that wraps what it was
        lowered to, so that the result takes and returns what ``module`` does.
    """
    if not any(_is_deferred(n) for n in module.graph.nodes):
        return module, lambda compiled: compiled
    body = duplicate(module)
    output = next(iter(body.graph.find_nodes(op="output")))
    leaves, structure = tree_flatten(output.args[0])
    arguments = {n: i for i, n in enumerate(body.graph.find_nodes(op="placeholder"))}
    kept = [(i, leaf) for i, leaf in enumerate(leaves) if not _is_deferred(leaf)]
    results: list[Any] = [leaf for _, leaf in kept]
    places = []
    for position, leaf in enumerate(leaves):
        if not _is_deferred(leaf):
            continue
        head = getattr(body, leaf.args[0].target)
        sources = tuple(_source(n, arguments, results) for n in leaf.args[1:])
        value = leaf.meta["example_value"]
        places.append(_Place(position, head, sources, value.dtype, value.requires_grad))
    output.args = (tuple(results),)
    for node in reversed(body.graph.find_nodes(op="call_function", target=deferred)):
        body.graph.erase_node(node)
    for node in body.graph.find_nodes(op="get_attr"):
        if not node.users:
            body.graph.erase_node(node)
    drop_unread_graphs(body)
    body.graph.lint()
    body.recompile()
    positions = tuple(i for i, _ in kept)

    def finish(compiled: Callable) -> Callable:
        return _finished(compiled, positions, tuple(places), structure)

    return body, finish


def _is_deferred(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is deferred


def _source(node: Node, arguments: dict[Node, int], results: list[Any]) -> tuple[str, int]:
    if node in arguments:
        return "argument", arguments[node]
    if not any(node is r for r in results):
        results.append(node)
    return "result", next(i for i, r in enumerate(results) if r is node)


def _finished(
    compiled: Callable, positions: tuple[int, ...], places: tuple[_Place, ...], structure: TreeSpec
) -> Callable:
    def run(*arguments: Any) -> Any:
        results = compiled(*arguments)
        leaves: list[Any] = [None] * (len(positions) + len(places))
        for position, result in zip(positions, results, strict=False):
            leaves[position] = result
        given = {"argument": arguments, "result": results}
        for place in places:
            inputs = [given[origin][index] for origin, index in place.sources]
            shape = (*inputs[0].shape[:-1], inputs[1].shape[0])
            leaves[place.position] = _make(_Value(place.head, inputs, place.grad), shape, place.dtype)
        return tree_unflatten(leaves, structure)

    return run
