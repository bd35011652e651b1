"""A program for people: its code with short names, and what each region holds."""

import re
from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.nested import count_operations
from rewriter.regions.program import Program, Region, RegionCall
from rewriter.report import ProgramRecord, RegionRecord

# How Dynamo writes the path of a module's tensor, which is not always a parameter there.
_FILLER = re.compile(
    r"^(?:(?:self|fn)_)+|(?:^|(?<=_))(?:dict_modules|modules|parameters|buffers|kwargs|args|stack\d+)_"
)
_OF_A_MODULE = re.compile(r"_(?:modules|parameters|buffers)_")
_LAYER = re.compile(r"^(.*?_\d+)_")


def describe(program: Program, steps: Mapping[Region, str] | None = None) -> ProgramRecord:
    """Plain text and numbers, which keep no graph alive.

    Args:
        steps: of regions that run in stages, what runs when, as text.
    """
    steps = steps or {}
    first = {call.region: call for call in reversed(program.calls)}
    times = program.times()
    regions = []
    for region in program.regions:
        weights = [n for n in first[region].inputs if _is_weight(n)]
        size = sum(value_of(n).nbytes for n in weights)
        regions.append(
            RegionRecord(
                region.name,
                times[region],
                count_operations(region.module),
                len(weights),
                size,
                str(region.module.graph),
                steps.get(region, ""),
            )
        )
    return ProgramRecord(_code(program), tuple(regions))


def _code(program: Program) -> str:
    lines = ["def program(inputs, weights):"]
    for call in program.calls:
        results = ", ".join(n.name for n in call.outputs if n.users)
        assigned = f"{results} = " if results else ""
        lines.append(f"    {assigned}{call.region.name}({', '.join(_arguments(call))})")
    (output,) = program.source.graph.find_nodes(op="output")
    lines.append(f"    return {', '.join(n.name for n in output.all_input_nodes)}")
    return "\n".join(lines)


def _arguments(call: RegionCall) -> list[str]:
    """Values by name; weights by the part of the model that they belong to, counted."""
    values = [_short(n) for n in call.inputs if not _is_weight(n)]
    owners: dict[str, int] = {}
    for node in call.inputs:
        if _is_weight(node):
            owner = _owner(_short(node))
            owners[owner] = owners.get(owner, 0) + 1
    return values + [
        f"weights.{owner}" + (f"[{count}]" if count > 1 else "") for owner, count in owners.items()
    ]


def _owner(name: str) -> str:
    """The layer that a weight is in, or the weight itself."""
    found = _LAYER.match(name)
    return found[1] if found else name


def _short(node: Node) -> str:
    return node.name if node.op != "placeholder" else _FILLER.sub("", node.name.removeprefix("l_")).strip("_")


def _is_weight(node: Node) -> bool:
    named = node.op == "placeholder" and _OF_A_MODULE.search(str(node.target))
    return bool(named) and isinstance(value_of(node), Tensor)
