"""Registers a fused op with PyTorch: one schema, one kernel, one fake implementation.

Every op lives in the namespace ``torch.ops.rewriter``. The kernel is registered for every device, so
that Triton's interpreter can run it on CPU tensors in the tests; the public function of an op (the one
that passes put into a graph) is what routes tensors of other devices to the op's reference.

``torch.library.custom_op`` is not used: its Python wrappers are more of the host's work at each call, of
which a step has a few hundred.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

library = torch.library.Library("rewriter", "DEF")

# Every op defined, with its layout tag, for the compiler that has to know them before it meets one.
operators: dict[torch._ops.OpOverload, torch.Tag] = {}
# Those that launch Triton kernels of ours, with what does so.
launchers: dict[torch._ops.OpOverload, Callable] = {}


def define(
    schema: str,
    *,
    kernel: Callable,
    fake: Callable,
    tags: Sequence[torch.Tag] = (torch.Tag.needs_exact_strides,),
    launches: bool = True,
) -> torch._ops.OpOverload:
    """Define ``rewriter::<schema>`` and return its overload.

    Args:
        schema: as ``rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)``. Outputs must
            not alias inputs.
        kernel: computes the outputs; imports Triton inside, so that matching needs no Triton.
        fake: shapes, strides and dtypes of the outputs, for fake tensors and symbolic sizes.
        tags: by default Inductor must pass the strides that the fake implementation saw.
        launches: whether ``kernel`` launches Triton kernels; then it is a module's own function, which other
            processes find by its name.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=tuple(tags))
    library.impl(name, on_its_device(kernel) if launches else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rewriter::{name}", fake, lib=library)
    op = getattr(torch.ops.rewriter, name).default
    operators[op] = tags[0]
    if launches:
        launchers[op] = kernel
    return op


def differentiate(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> None:
    """Give ``op`` its explicit backward, as ``torch.library.register_autograd`` takes it."""
    name = op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def on_its_device(kernel: Callable) -> Callable:
    """``kernel`` with the GPU of its tensors as the current one, on which Triton launches.

    Some of the tensors may be in host memory.
    """

    @functools.wraps(kernel)
    def launching(*arguments, **named):
        given = (*arguments, *named.values())
        on_gpu = next((x for x in given if isinstance(x, Tensor) and x.is_cuda), None)
        if on_gpu is None:
            return kernel(*arguments, **named)
        with torch.cuda.device_of(on_gpu):
            return kernel(*arguments, **named)

    return launching
