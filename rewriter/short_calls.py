"""Calls of a compiled region without what AOTAutograd does around them, where that does nothing.

AOTAutograd's callable serves any graph and any caller: each call looks for subclasses, aliases, mutations,
leftovers of transforms, dead wrappers and random states, argument by argument, under two modes of autograd. A
region has none of these, is called by a program that is known, and is called once a layer. ``ShortCall``
calls what was compiled by the function that AOTAutograd made for it, with the same tensors saved in the same
way, and leaves to AOTAutograd each call that it does not know to be plain: the first ones, until the backward
is compiled, those without gradients, those under transforms, backwards that keep their graph or are
differentiated, and gradients of subclasses.

PyTorch's private modules are touched here for the function's parts; what is not found as expected leaves the
calls as they are. Written against ``torch/_functorch/_aot_autograd/runtime_wrappers.py`` of 2.11 and 2.13.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class ShortCall:
    """A region's compiled function, called by the shortest way that is right.

    Args:
        whole: as AOTAutograd made it, for positional tensors and sizes. None of its results may be seen by
            anyone but other regions: they carry no marks of dynamic sizes for later compilations.
    """

    def __init__(self, whole: Callable):
        self._whole = whole
        self._short: Callable | None = None
        self._settled = _inlines_hooks()

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._short is not None and torch.is_grad_enabled() and not _transforms():
            return self._short(*inputs)
        results = self._whole(*inputs)
        if not self._settled:
            self._settle(inputs, results)
        return results

    def _settle(self, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Find the function that made ``results``; once its backward is compiled, decide."""
        node = _node_of(results)
        function: Any = getattr(node, "_forward_cls", None)
        if getattr(function, "compiled_bw", None) is None:
            return
        self._settled = True
        if is_plain(function.metadata, function, len(results)) and reads(node, inputs):
            self._short = shortened(function)


def _node_of(results: Sequence[Any]) -> Any:
    """What made all results that need a gradient, if that is one."""
    nodes = {r.grad_fn for r in results if isinstance(r, Tensor) and r.requires_grad}
    return nodes.pop() if len(nodes) == 1 else None


def reads(node: Any, inputs: Sequence[Any]) -> bool:
    """Whether the function's arguments are ``inputs``, all of them, in their order.

    Neither is one left out or detached on the way, nor is the node that of an input passed through.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    behind = [found for found, _ in node.next_functions]
    return len(tensors) == len(behind) and all(map(_leads_to, behind, tensors))


def _leads_to(node: Any, x: Tensor) -> bool:
    if not x.requires_grad:
        return node is None
    return node is x.grad_fn if x.grad_fn is not None else getattr(node, "variable", None) is x


def is_plain(metadata: Any, function: Any, results: int) -> bool:
    """Whether a call does no more than to compute, to save, and to return ``results`` fresh tensors."""
    counted = (
        metadata.num_mutated_inp_runtime_indices,
        metadata.num_intermediate_bases,
        metadata.num_outputs_aliased,
        metadata.num_unsafe_view_outputs,
        metadata.num_graphsafe_rng_states,
        metadata.num_backward_tokens,
        len(metadata.tokens),
        len(metadata.mutated_graph_handled_indices_seen_by_autograd),
        len(metadata.indices_of_inputs_that_requires_grad_with_mutations_in_bw),
        metadata.num_opaque_objects_saved_for_bw or 0,
    )
    return (
        not any(counted)
        and not metadata.is_rng_op_functionalized
        and metadata.grad_enabled_mutation is None
        and function.maybe_subclass_metadata is None
        and metadata.num_outputs == metadata.num_forward_returns == results
        and all(getattr(f, "_boxed_call", False) for f in (function.compiled_fw, function.compiled_bw))
    )


def shortened(function: Any) -> Callable:
    """``function.apply`` for plain calls; ``function`` is what AOTAutograd made, an ``autograd.Function``."""
    from torch._functorch._aot_autograd.runtime_wrappers import coerce_to_expected_memory_format

    metadata, forward_graph = function.metadata, function.compiled_fw
    count = metadata.num_forward_returns
    checked = metadata.tensors_saved_for_backwards_with_vc_check_slice
    unchecked = metadata.tensors_saved_for_backwards_no_vc_check_slice
    sizes = metadata.symints_saved_for_backwards_slice
    constants = [i for i, out in enumerate(metadata.output_info) if _is_tensor(out) and not out.requires_grad]
    tangents = [i for i, out in enumerate(metadata.output_info) if _is_tensor(out) and _in_backward(out)]
    layouts = [meta.memory_format for meta in metadata.subclass_tangent_meta]
    boxed = getattr(function, "boxed_grads_call", False)

    class ShortFunction(function):
        # What AOTAutograd's own backward, and compiled autograd, look for in ``ctx`` is there by its names.

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
            with torch._C._DisableAutocast():
                results = forward_graph(list(inputs))
            # A saved view of a result would hold the graph that holds it.
            ctx.save_for_backward(*[x.detach() if x._is_view() else x for x in results[checked]])
            ctx._tensors_no_vc_check = [x.detach() if x._is_view() else x for x in results[unchecked]]
            ctx.symints, ctx.opaque_objects = results[sizes], ()
            ctx.mark_non_differentiable(*[results[i] for i in constants])
            ctx._materialize_non_diff_grads = False
            return tuple(results[:count])

        @staticmethod
        def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
            gradients = given[0] if boxed else list(given)
            read = [gradients[i] for i in tangents]
            if _is_unusual(metadata, read):
                return function.backward(ctx, *given)
            del given
            gradients.clear()
            laid_out = map(coerce_to_expected_memory_format, read, layouts)
            arguments = [*ctx.symints, *ctx.saved_tensors, *ctx._tensors_no_vc_check, *laid_out]
            del read, laid_out
            ctx.maybe_clear_saved_tensors()
            with torch._C._DisableAutocast():
                return tuple(function.compiled_bw(arguments))

    # Not ``Function.apply``, which asks of each argument whether a transform that ended has left it.
    short: Any = super(torch.autograd.Function, cast(Any, ShortFunction))
    return short.apply


def _is_tensor(result: Any) -> bool:
    return issubclass(result.raw_type, Tensor)


def _in_backward(result: Any) -> bool:
    """Whether the backward reads the result's gradient."""
    return getattr(result, "requires_grad_for_backward", result.requires_grad)


def _is_unusual(metadata: Any, gradients: Sequence[Any]) -> bool:
    """Whether a backward of these needs more than the compiled graph, if only an error."""
    return (
        torch.is_grad_enabled()
        or cast(Any, torch._C)._autograd._get_current_graph_task_keep_graph()
        or _transforms()
        or (metadata.deterministic is False and torch.are_deterministic_algorithms_enabled())
        or any(type(g) is not Tensor for g in gradients)
    )


def _transforms() -> bool:
    return torch._C._are_functorch_transforms_active()


def _inlines_hooks() -> bool:
    """Whether hooks of saved tensors became part of the graph, and must not run beside it."""
    from torch._functorch._aot_autograd.runtime_wrappers import _should_disable_saved_tensors_hooks

    return _should_disable_saved_tensors_hooks()
