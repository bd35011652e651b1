"""Activation checkpoints to what is in them: what is computed again is then the plan's to decide.

    checkpoint(layer, h, ...) -> h'      ->      the layer's own operations

``gradient_checkpointing=True`` says that memory is short, and one way to save it: keep the input of each
layer, run all of it again. A budget says the first better, and the plan does the second better: where
everything fits nothing is run again, and where it does not, what is dear to compute and small to keep is not.
"""

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from rewriter.nested import checkpoint_body, drop_unread_graphs, duplicate
from rewriter.regions.program import Program

# What a report says of a program, or model, whose checkpoints were unwrapped.
UNWRAPPED = "gradient checkpointing: what is computed again is as the memory plan says"


def without_checkpoints(program: Program) -> GraphModule | None:
    """The program's graph with the body of each checkpoint in its place; None where there is none."""
    source = duplicate(program.source)
    found = [n for n in source.graph.nodes if checkpoint_body(n) is not None]
    for number, node in enumerate(found):
        _unwrap(source, node, f"checkpointed_{number}")
    drop_unread_graphs(source)
    return source if found else None


def _unwrap(source: GraphModule, node: Node, prefix: str) -> None:
    body = checkpoint_body(node)
    assert body is not None
    graph, wrapped = source.graph, node.args[0]
    env: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                name = f"{prefix}_{str(inner.target).replace('.', '_')}"
                setattr(source, name, getattr(body, str(inner.target)))
                env[inner] = graph.create_node("get_attr", name)
                env[inner].meta = dict(inner.meta)
            elif inner.op not in ("placeholder", "output"):
                env[inner] = graph.node_copy(inner, lambda n: env[n])
    (output,) = body.graph.find_nodes(op="output")
    results = map_arg(output.args[0], lambda n: env[n])
    for reader in list(node.users):
        reader.replace_all_uses_with(results[reader.args[1]])
        graph.erase_node(reader)
    graph.erase_node(node)
    if isinstance(wrapped, Node) and not wrapped.users:
        graph.erase_node(wrapped)
