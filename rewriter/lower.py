"""A rewritten graph to a callable: AOTAutograd and Inductor, or AOTAutograd alone.

PyTorch's private modules that lowering needs are touched here alone.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._guards import TracingContext, tracing
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from rewriter.cast_again import cast_again, weights_of
from rewriter.draws_apart import keep_draws_apart
from rewriter.gate_gradients import join_gate_gradients
from rewriter.kernels.dropout import dropped
from rewriter.kernels.gated_activation import gated_activation, gated_activation_packed
from rewriter.kernels.host_weight import host_weight
from rewriter.kernels.registration import operators
from rewriter.kernels_ahead import KernelsAhead
from rewriter.made_again import make_again
from rewriter.norm_rooms import leave_rooms
from rewriter.options import Options
from rewriter.regions.program import Program, Region, link
from rewriter.short_calls import ShortCall

if TYPE_CHECKING:
    from rewriter.progress import ProgressLine

# Functions whose results a backward computes again. A gated activation is as wide as what it is made of,
# which is saved for its own backward, and costs one more write in that one's launch; a partitioner would save
# the result of any op that it does not know: in 8 layers of 8B, 4,096 tokens, 0.9 GiB. Dropout by position
# is drawn again from its seed. A weight from host memory is let go behind its reader, and copied again for
# another one.
RECOMPUTED = frozenset((dropped, gated_activation, gated_activation_packed, host_weight))


@functools.cache
def source_hash() -> str:
    """SHA-256 of the package's sources: what compiled results of ours depend on beside the graph."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


Around = Callable[[], AbstractContextManager]


def lower(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    around_backward: Around = nullcontext,
) -> Callable:
    """Compile ``module``; the result takes and returns what the module does.

    Args:
        around_backward: entered while the backward is compiled, which is when it first runs.
    """
    keep_draws_apart()
    for node in module.graph.nodes:
        if node.target in RECOMPUTED:
            # Tracing copies it to the operations that the node becomes, and partitioners read it there.
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    if options.lowering == "eager":
        return _lower_eager(module, example_inputs, around_backward)
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_half(half: GraphModule, *given: Any, **settings: Any) -> Any:
        backward, inference = (settings.get(name) for name in ("is_backward", "is_inference"))
        _leave_rooms(half, forward=not (backward or inference))
        with around_backward() if backward else nullcontext():
            return compile_fx_inner(half, *given, **settings)

    _register_operators()
    patches = {**_mode_settings(options.mode), **_cache_key(module)}
    patches |= _graph_passes(tuple(example_inputs), weights_of(module))
    compiled = compile_fx(module, list(example_inputs), compile_half, config_patches=patches)
    return cast(Callable, compiled)


def records_cuda_graphs(options: Options) -> bool:
    """Whether Inductor will record CUDA graphs, which hold the addresses of a call's weights."""
    if options.lowering == "eager":
        return False
    from torch._inductor import config

    return bool(_mode_settings(options.mode).get("triton.cudagraphs", config.triton.cudagraphs))


def _mode_settings(mode: str | None) -> dict[str, Any]:
    """What of Inductor's configuration ``mode`` changes."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode else {}


def lower_beside(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    around_backward: Around = nullcontext,
) -> Callable:
    """``lower``, for a second graph of the same inputs: in a context of its own, with the same guards."""
    context = TracingContext.try_get()
    if context is None:
        return lower(module, example_inputs, options, around_backward)
    own = TracingContext(context.fake_mode)
    own.tensor_to_context = context.tensor_to_context
    own.guards_context = context.guards_context
    with tracing(own):
        return lower(module, example_inputs, options, around_backward)


def lower_program(program: Program, options: Options, line: "ProgressLine") -> Callable:
    """Compile each region once; the result calls them as the program does.

    Args:
        line: told which region is being compiled, and how many there are, of backwards when they first run.
    """
    compiled: dict[Region, Callable] = {}
    regions = program.regions
    for number, region in enumerate(regions, 1):
        which = f"{region.name}, {number} of {len(regions)}"
        line.now(f"compiling {which}")
        backward = functools.partial(line.while_at, f"compiling the backward of {which}")
        compiled[region] = lower_beside(region.module, region.inputs, options, backward)
    return link(program, {region: short_call(program, region, code) for region, code in compiled.items()})


def short_call(program: Program, region: Region, code: Callable) -> Callable:
    """``code``, which runs ``region``, for this program's calls of it."""
    return code if region in program.ending else ShortCall(code)


def lower_stage(module: GraphModule, inputs: Sequence[Any], fake_mode: Any, options: Options) -> Callable:
    """Compile a graph that has no gradients in it, of the fake ``inputs`` of its own ``fake_mode``."""
    if options.lowering == "eager":
        return module.forward
    with tracing(TracingContext(fake_mode)), torch.no_grad():
        return lower(module, inputs, options)


@functools.cache
def _register_operators() -> None:
    """Tell Inductor to call our ops as they are.

    It would find out by itself, but torch 2.11 first formats the arguments of an op that it does not know for
    a log line, and that text is exponential in the number of ops behind them.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint

    for op, tag in operators.items():
        if op not in lowerings:
            make_fallback(op, layout_constraint=tag_to_layout_constraint(tag))


def _graph_passes(inputs: tuple[Any, ...], weights: tuple[int, ...]) -> dict[str, Any]:
    """What of ours looks at the graphs that Inductor compiles, but where the user has a pass of theirs.

    Args:
        inputs: of the graph that is compiled, ``weights`` the places of those that are there all the time.
    """
    from torch._inductor import config

    def joint(graph: Graph) -> None:
        cast_again(graph, inputs, weights)
        make_again(graph)
        _kernels_ahead().compile(graph)

    def final(graph: Graph) -> None:
        join_gate_gradients(graph, functional=True)
        _kernels_ahead().compile(graph)

    own = _own_pass()
    passes = {
        "joint_custom_pre_pass": own(joint, str(weights)),
        "post_grad_custom_pre_pass": own(final, ""),
    }
    return {name: found for name, found in passes.items() if not getattr(config, name)}


@functools.cache
def _kernels_ahead() -> KernelsAhead:
    return KernelsAhead()


@functools.cache
def _own_pass() -> type:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class OwnPass(CustomGraphPass):
        def __init__(self, run: Callable[[Graph], None], case: str):
            self.run, self.case = run, case

        def __call__(self, graph: Graph) -> None:
            self.run(graph)

        def __deepcopy__(self, memo: Any) -> "OwnPass":
            return self

        def uuid(self) -> str:
            # Caches hold what it made under this key.
            return source_hash() + self.case

    return OwnPass


def _cache_key(module: GraphModule) -> dict[str, Any]:
    """Let PyTorch's caches hold graphs that call our functions, under a key that changes with our sources.

    Without it every graph with a rewrite would miss AOTAutograd's cache, and one cached before an update of
    the package would be returned after it. Switches of autocast are on no list of PyTorch's own, and every
    model has some around its rotary embedding; all that they do depends on their arguments.
    """
    functions = {
        f"{n.target.__module__}.{n.target.__name__}"
        for m in module.modules()
        if isinstance(m, GraphModule)
        for n in m.graph.nodes
        if n.op == "call_function" and _may_be_cached(n.target)
    }
    return (
        {"unsafe_marked_cacheable_functions": dict.fromkeys(sorted(functions), source_hash())}
        if functions
        else {}
    )


def _may_be_cached(function: Any) -> bool:
    own = (getattr(function, "__module__", None) or "").partition(".")[0] == "rewriter"
    return own or function in (_enter_autocast, _exit_autocast)


def _lower_eager(module: GraphModule, example_inputs: Sequence[Any], around_backward: Around) -> Callable:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def forward_compiler(forward: GraphModule, given: list[Any]) -> Callable:
        _leave_rooms(forward, forward=True)
        return boxed_nop(forward, given)

    def backward_compiler(backward: GraphModule, given: list[Any]) -> Callable:
        with around_backward():
            join_gate_gradients(backward.graph, functional=True)
            _leave_rooms(backward, forward=False)
            return boxed_nop(backward, given)

    inputs, weights = tuple(example_inputs), weights_of(module)

    def partition(joint: GraphModule, *given: Any, **settings: Any) -> Any:
        cast_again(joint.graph, inputs, weights)
        make_again(joint.graph)
        return min_cut_rematerialization_partition(joint, *given, **settings)

    compiler = aot_autograd(
        fw_compiler=forward_compiler,
        inference_compiler=boxed_nop,
        bw_compiler=backward_compiler,
        partition_fn=partition,
    )
    return compiler(module, list(example_inputs))


def _leave_rooms(half: GraphModule, *, forward: bool) -> None:
    """In a forward or a backward, as AOTAutograd hands it to a compiler."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if forward and context is not None else None
    # A forward's results are followed by what it saves.
    leave_rooms(half.graph, functional=True, returned=None if metadata is None else metadata.num_forward)
    half.recompile()
