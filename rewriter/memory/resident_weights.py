"""The 4-bit weights of a region that could stay dequantised, and the region that is given them so.

    lora_linears(x, ((data, …, absmax, …),), …)  ->  lora_linears(x, ((weight, (N, K)),), …)

On the right ``weight`` is an input of its own, which stands for the packed data and its scales; those are
inputs no longer. A weight stays in the form in which its forward and its backward use it
(``kernels/resident_weight.py``), so that both compute what they did.

Left as they are: weights that forward and backward want in two forms, those of which a part is computed by
the program or trained, and those inside of activation checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from rewriter.canonical import value_of
from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.lora_linear import linear_4bit, lora_linear, lora_linears, resident_forms
from rewriter.kernels.resident_weight import Form, ResidentWeight
from rewriter.memory.costs import value_bytes
from rewriter.nested import duplicate
from rewriter.regions.program import Program, Region, RegionCall

_VIEWS = frozenset({"view", "reshape", "t", "detach", "flatten"})


@dataclass(frozen=True, eq=False)
class Lasting:
    """A weight of a region that could stay.

    Attributes:
        call, index: who reads it, and which of that call's weights it is.
        parts: makes the tensors of the packed weight, five or None, of the inputs at ``takes``.
        takes: the packed weight's among the region's inputs; its data first.
        matrix: of the adapter's matrix in its room, if it has one.
        packing: shape, block size and type.
        uses: how many times a step dequantises it, forward and backward.
    """

    call: Node
    index: int
    parts: GraphModule
    takes: tuple[int, ...]
    matrix: int | None
    packing: tuple[tuple[int, int], int, str]
    form: Form
    device: torch.device
    packed_bytes: int
    uses: tuple[int, int]

    @property
    def nbytes(self) -> int:
        rows, columns = self.form.shape(self.packing[0])
        return rows * columns * self.form.dtype.itemsize

    def packed(self, inputs: Sequence[Tensor]) -> Packed4bit:
        """The packed weight, of the tensors at ``takes``."""
        data, absmax, *scales = self.parts(*inputs)
        return Packed4bit(data, self.packing[0], absmax, *self.packing[1:], *scales)


def lasting(program: Program, region: Region) -> list[Lasting]:
    """The weights of ``region`` that could stay: in every call they are frozen inputs of the program's."""
    nodes = region.module.graph.find_nodes(op="placeholder")
    places = {node: i for i, node in enumerate(nodes)}
    values = dict(zip(nodes, region.inputs, strict=True))
    needs = _needing_gradients(region)
    calls = [call.inputs for call in program.calls if call.region is region]
    given = [all(inputs[i].op == "placeholder" for inputs in calls) for i in range(len(nodes))]
    found = []
    for call in region.module.graph.nodes:
        if call.op != "call_function" or call.target not in _ARGUMENTS or call.kwargs:
            continue
        arguments = _ARGUMENTS[call.target](*call.args)
        known = map_arg(arguments, lambda n: values[n] if n in values else value_of(n))
        uses = (1, int(isinstance(arguments[0], Node) and arguments[0] in needs))
        for index, (weight, form) in enumerate(zip(arguments[1], resident_forms(*known), strict=True)):
            if form is None:
                continue
            matrix = (arguments[4] if form.dim else arguments[3])[index] if form.room else None
            packed: Packed4bit = weight
            made = _parts(packed)
            if made is None or (matrix is not None and not (matrix in places and given[places[matrix]])):
                continue
            (parts, sources), (rows, columns) = made, packed.shape
            takes = tuple(places[n] for n in sources)
            if not all(given[i] and not region.inputs[i].requires_grad for i in takes):
                continue
            found.append(
                Lasting(
                    call,
                    index,
                    parts,
                    takes,
                    None if matrix is None else places[matrix],
                    ((rows, columns), packed.blocksize, packed.quant_type),
                    form,
                    values.get(packed.absmax, value_of(packed.absmax)).device,
                    sum(value_bytes(region.inputs[i]) for i in takes),
                    uses,
                )
            )
    return found


@dataclass(frozen=True, eq=False)
class Given:
    """A region that is given weights dequantised: after the inputs ``left`` of the other's, one for each."""

    region: Region
    left: tuple[int, ...]


def given_dequantised(region: Region, weights: Sequence[Lasting], name: str) -> Given:
    """``region``, called ``name``, with ``weights`` as inputs."""
    module = duplicate(region.module)
    same = dict(zip(region.module.graph.nodes, module.graph.nodes, strict=True))
    inputs = list(module.graph.find_nodes(op="placeholder"))
    spent: list[Node] = []
    last, fakes = inputs[-1], []
    for number, weight in enumerate(weights):
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"dequantised_{number}")
        fakes.append(fake_of(weight, region))
        last.meta["example_value"] = fakes[-1]
        call = same[weight.call]
        packed = call.args[1] if call.target is not lora_linears else call.args[1][weight.index]
        spent += [n for n in packed if isinstance(n, Node)]
        one = ResidentWeight(cast(Tensor, last), weight.packing[0])
        kept = list(call.args[1]) if call.target is lora_linears else []
        if kept:
            kept[weight.index] = one
        call.args = (call.args[0], tuple(kept) if kept else one, *call.args[2:])
    _drop(module.graph, spent)
    left = tuple(i for i, n in enumerate(inputs) if not n._erased)
    module.recompile()
    return Given(Region(name, module, (*(region.inputs[i] for i in left), *fakes)), left)


def fake_of(weight: Lasting, region: Region) -> Tensor:
    """A tensor like the one that stays, of the mode of the region's inputs."""
    mode = next(x.fake_mode for x in region.inputs if hasattr(x, "fake_mode"))
    with mode:
        return torch.empty(
            weight.form.shape(weight.packing[0]), dtype=weight.form.dtype, device=weight.device
        )


def _single(x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: Any = 1.0, own: Any = None, *dtypes: Any):
    return x, (weight,), (bias,), (a,), (b,), (scale,), None if own is None else (own,), *dtypes


def _bare(x: Any, weight: Any, bias: Any = None, compute: Any = None, out: Any = None):
    return x, (weight,), (bias,), (None,), (None,), (1.0,), None, compute, None, out


# What reads packed weights, and its arguments as those of the first.
_ARGUMENTS = {lora_linears: lambda *given: given, lora_linear: _single, linear_4bit: _bare}


def _parts(packed: Packed4bit) -> tuple[GraphModule, list[Node]] | None:
    """A graph of the tensors of ``packed``, and the inputs that they are views of; None if they are none."""
    tensors: tuple[Any, ...]
    tensors = (packed.data, packed.absmax, packed.absmax_8bit, packed.absmax_code, packed.absmax_offset)
    graph, copies, sources = Graph(), {}, []
    for node in (n for n in tensors if isinstance(n, Node)):
        chain: list[Any] = [node]
        while chain[-1].op == "call_method" and chain[-1].target in _VIEWS:
            if not isinstance(chain[-1].args[0], Node) or len(chain[-1].all_input_nodes) > 1:
                return None
            chain.append(chain[-1].args[0])
        if chain[-1].op != "placeholder":
            return None
        if chain[-1] not in copies:
            copies[chain[-1]] = graph.placeholder(chain[-1].name)
            sources.append(chain[-1])
        for view in reversed(chain[:-1]):
            copies.setdefault(view, graph.node_copy(view, copies.__getitem__))
    graph.output(tuple(copies.get(n) for n in tensors))
    return GraphModule({}, graph), sources


def _drop(graph: Graph, nodes: list[Node]) -> None:
    """Take out those of ``nodes`` that nobody reads, and what was there for them alone."""
    while nodes:
        node = nodes.pop()
        if node._erased or node.users:
            continue
        nodes += node.all_input_nodes
        graph.erase_node(node)


def _needing_gradients(region: Region) -> set[Node]:
    """The values of ``region`` that hang on an input that needs a gradient."""
    inputs = zip(region.module.graph.find_nodes(op="placeholder"), region.inputs, strict=True)
    needs = {n for n, x in inputs if isinstance(x, Tensor) and x.requires_grad}
    for node in region.module.graph.nodes:
        if not needs.isdisjoint(node.all_input_nodes):
            needs.add(node)
    return needs


def dequantised_source(call: RegionCall, weight: Lasting, graph: Graph, after: Node) -> Node:
    """An input of ``graph``, a copy of the program's, for what stays of a call's ``weight``."""
    packed = call.inputs[weight.takes[0]]
    with graph.inserting_after(after):
        node = graph.placeholder(f"{str(packed.target).rstrip('_')}_dequantised_")
    node.meta["example_value"] = fake_of(weight, call.region)
    return node
