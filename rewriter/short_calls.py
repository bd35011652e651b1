"""Calls of a compiled region without what AOTAutograd does around them, where that does nothing.

AOTAutograd's callable serves any graph and any caller: each call looks for subclasses, aliases, mutations,
leftovers of transforms, dead wrappers and random states, argument by argument, under two modes of autograd. A
region has none of these, is called by a program that is known, and is called once a layer. ``ShortCall``
calls what was compiled by the function that AOTAutograd made for it, with the same tensors saved in the same
way, and leaves to AOTAutograd each call that it does not know to be plain: the first ones, until the backward
is compiled, those without gradients, those under transforms, backwards that keep their graph or are
differentiated, and gradients of subclasses.

PyTorch's private modules are touched here for the function's parts. Where a part is missing, as in a later
PyTorch, calls stay as they are (``_has_parts``). Written against
``torch/_functorch/_aot_autograd/runtime_wrappers.py`` of 2.11 and 2.13.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

# What AOTAutograd's metadata counts or lists of what a plain call has none of.
_NONE_OF = (
    "num_mutated_inp_runtime_indices",
    "num_intermediate_bases",
    "num_outputs_aliased",
    "num_unsafe_view_outputs",
    "num_graphsafe_rng_states",
    "num_backward_tokens",
    "num_opaque_objects_saved_for_bw",
    "tokens",
    "mutated_graph_handled_indices_seen_by_autograd",
    "indices_of_inputs_that_requires_grad_with_mutations_in_bw",
    "is_rng_op_functionalized",
)
# What else is read: of the function, its metadata, each result and gradient described there, and PyTorch.
_OF_FUNCTION = (
    "metadata",
    "compiled_fw",
    "compiled_bw",
    "maybe_subclass_metadata",
    "maybe_clear_saved_tensors",
)
_OF_METADATA = (
    "grad_enabled_mutation",
    "deterministic",
    "num_outputs",
    "num_forward_returns",
    "output_info",
    "subclass_tangent_meta",
    "tensors_saved_for_backwards_with_vc_check_slice",
    "tensors_saved_for_backwards_no_vc_check_slice",
    "symints_saved_for_backwards_slice",
)
_OF_RESULT = ("raw_type", "requires_grad")
_OF_TANGENT = ("memory_format",)
_OF_TORCH = ("_DisableAutocast", "_are_functorch_transforms_active")


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
        if is_plain(function, len(results)) and reads(node, inputs):
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


def is_plain(function: Any, results: int) -> bool:
    """Whether a call of it does no more than to compute, to save, and to return ``results`` fresh tensors.

    Args:
        function: what AOTAutograd made, an ``autograd.Function``.
    """
    if not _has_parts(function):
        return False
    metadata = function.metadata
    return (
        not any(getattr(metadata, name) for name in _NONE_OF)
        and metadata.grad_enabled_mutation is None
        and function.maybe_subclass_metadata is None
        and metadata.num_outputs == metadata.num_forward_returns == results
        and all(getattr(f, "_boxed_call", False) for f in (function.compiled_fw, function.compiled_bw))
    )


def _has_parts(function: Any) -> bool:
    """Whether all that is read here of ``function`` and of PyTorch's private modules is there by its name."""
    if not _has(function, _OF_FUNCTION) or not _has(function.metadata, (*_NONE_OF, *_OF_METADATA)):
        return False
    metadata, core = function.metadata, cast(Any, torch._C)
    return (
        all(_has(result, _OF_RESULT) for result in metadata.output_info)
        and all(_has(tangent, _OF_TANGENT) for tangent in metadata.subclass_tangent_meta)
        and _has(core, _OF_TORCH)
        and hasattr(core._autograd, "_get_current_graph_task_keep_graph")
        and _runtime("coerce_to_expected_memory_format") is not None
    )


def _has(owner: Any, names: Iterable[str]) -> bool:
    return all(hasattr(owner, name) for name in names)


def _runtime(name: str) -> Any:
    """A part of AOTAutograd's runtime, which is loaded once something is compiled; None if missing."""
    return getattr(sys.modules.get("torch._functorch._aot_autograd.runtime_wrappers"), name, None)


def shortened(function: Any) -> Callable:
    """``function.apply`` for calls that are plain, by ``is_plain``."""
    coerce_to_expected_memory_format = _runtime("coerce_to_expected_memory_format")
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
    """Whether hooks of saved tensors became part of the graph, and must not run beside it, or may have."""
    inlines = _runtime("_should_disable_saved_tensors_hooks")
    return inlines is None or inlines()
