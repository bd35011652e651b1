"""The graphs that Dynamo hands a backend for a model, and a text form of them for people."""

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn

Graph = tuple[fx.GraphModule, list]


def capture(
    model: nn.Module, /, *, dynamic: bool | None = None, autocast: torch.dtype | None = None, **inputs
) -> list[Graph]:
    """Run ``model(**inputs)`` under Dynamo; return each graph with the example inputs it came with.

    The graphs are run as they are, so graphs after a graph break are captured too. ``autocast``, a dtype,
    is entered outside the compiled call.
    """
    graphs: list[Graph] = []

    def record(graph: fx.GraphModule, example_inputs: list):
        graphs.append((graph, list(example_inputs)))
        return graph.forward

    torch._dynamo.reset()
    device = next(model.parameters()).device.type
    outside = torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext()
    with outside, torch.enable_grad():
        torch.compile(model, backend=record, dynamic=dynamic)(**inputs)
    torch._dynamo.reset()
    return graphs


def dump(graph: fx.GraphModule, indent: str = "") -> str:
    """One line a node: ``name = target(arguments) : shape dtype grad``; the bodies of subgraphs after it."""
    return "\n".join(_lines(graph, indent))


def _lines(graph: fx.GraphModule, indent: str) -> Iterator[str]:
    for node in graph.graph.nodes:
        arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
        yield f"{indent}{node.name} = {_target(node)}({', '.join(arguments)}){_value(node)}"
    for name, child in graph.named_children():
        if isinstance(child, fx.GraphModule):
            yield f"{indent}-- {name}:"
            yield from _lines(child, indent + "    ")


def _target(node: fx.Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op != "call_function":
        return node.op if node.op in ("placeholder", "output") else f"{node.op}:{node.target}"
    module = getattr(node.target, "__module__", "") or ""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{module}.{name}" if module else name


def _value(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if value is None:
        return ""
    return " : " + _described(value)


def _described(value) -> str:
    if isinstance(value, torch.Tensor):
        size = "x".join(str(s) for s in value.shape) or "scalar"
        grad = " grad" if value.requires_grad else ""
        kind = " Parameter" if isinstance(value, nn.Parameter) else ""
        return f"{size} {str(value.dtype).removeprefix('torch.')}{grad}{kind}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_described(v) for v in value) + ")"
    return f"{type(value).__name__} {value}"
