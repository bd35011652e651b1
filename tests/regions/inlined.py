"""A program put back together: one graph, as before outlining."""

from typing import Any

from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

from rewriter.regions.program import Program, tensors_of


def inline(program: Program) -> GraphModule:
    """The program as one graph again, each region's operations in place of its calls."""
    source = program.source
    graph, env = Graph(), {}
    bodies: dict[str, Any] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and node in tensors_of(source)):
            env[node] = graph.node_copy(node)
            if node.op == "get_attr":
                bodies[node.target] = getattr(source, node.target)
    for index, call in enumerate(program.calls):
        inner = dict(
            zip(
                call.region.module.graph.find_nodes(op="placeholder"),
                (env[n] for n in call.inputs),
                strict=True,
            )
        )
        for node in call.region.module.graph.nodes:
            if node.op == "output":
                results = [inner[n] for n in node.args[0]]
                env.update(zip(call.outputs, results, strict=True))
            elif node.op != "placeholder":
                inner[node] = graph.node_copy(node, lambda n, inner=inner: inner[n])
                if node.op == "get_attr":
                    inner[node].target = f"{node.target}_{index}"
                    bodies[inner[node].target] = getattr(call.region.module, node.target)
    (output,) = source.graph.find_nodes(op="output")
    graph.output(map_arg(output.args[0], env.__getitem__))
    graph.lint()
    return GraphModule(bodies, graph)
