"""What a stage may do at once that it does in parts otherwise: quicker, for more memory while it runs.

Tiles' weights are made before the first tile (``before_tiles.py``); a long attention's backward has all heads
together (``long_attention.py``). Each is another graph in the place of a stage's own, whose results are the
same numbers, and concerns nothing outside of that stage's run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.fx import GraphModule

# Compiles a graph, given its fake inputs and their fake mode.
CompileGraph = Callable[[GraphModule, list[Any], Any], Callable]
# The graphs of a layer's stages that do so: by "run" or "backward" and place.
Once = frozenset[tuple[str, int]]


class AtOnce(Protocol):
    """What takes the place of a stage's graph."""

    def compiled(self, compile_graph: CompileGraph, inputs: Sequence[Any], mode: Any) -> Callable:
        """Called as the graph is; ``inputs``: fake ones of the graph, of ``mode``.

        Raises:
            AtOnceUncompiled: it cannot be compiled.
        """
        ...


class AtOnceUncompiled(Exception):
    """``at_once`` cannot be compiled, for ``reason``; the graph whose place it takes perhaps can."""

    def __init__(self, at_once: AtOnce, reason: Exception):
        super().__init__(f"{type(reason).__name__}: {reason}")
        self.at_once, self.reason = at_once, reason


def compiled_graph(
    compile_graph: CompileGraph, mode: Any, graph: GraphModule, inputs: list[Any], at_once: AtOnce | None
) -> Callable:
    """``graph`` compiled, or what takes its place; of fake ``inputs`` of ``mode``."""
    if at_once is None:
        return compile_graph(graph, inputs, mode)
    return at_once.compiled(compile_graph, inputs, mode)
