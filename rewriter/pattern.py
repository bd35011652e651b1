"""A pattern: one plain PyTorch function, traced without example inputs.

    @rewrite(to=rms_norm)
    def llama_norm(x, weight, eps):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return weight * h.to(x.dtype)

The function's parameters are holes: each binds a value of the graph, a constant, or None for an argument
that is absent. They are handed to ``to`` by name; the names are checked here, when the module is imported,
so that a malformed pattern never reaches a training run. The function stays callable: it is the
specification of what it matches.
"""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType
from typing import Any

import torch
from torch import fx
from torch.fx import Node, Proxy

from rewriter.canonical import Call, canonical, is_metadata


class PatternError(TypeError):
    """A pattern that could never match or never be replaced; raised where it is declared."""


class Unmet(Exception):
    """A guard's condition that does not hold; its text is the reason in the report."""


def require(condition: bool, reason: str) -> None:
    """State a rewrite's condition in a guard: where it fails, the match becomes a miss with ``reason``."""
    if not condition:
        raise Unmet(reason)


def maybe(function: Callable, x: Any, *args: Any) -> Any:
    """In a pattern: ``function(x, *args)``, or just ``x``, in which case the holes among ``args`` bind None.

    Called with real tensors it applies the function unless an argument is None.
    """
    if isinstance(function, Proxy) or not callable(function):
        given = function.node if isinstance(function, Proxy) else function
        raise PatternError(f"maybe: `{given}` is no function; give it first, as maybe(F.dropout, x, p).")
    if isinstance(x, Proxy):
        return x.tracer.create_proxy("call_function", maybe, (function, x, *args), {})
    return x if any(a is None for a in args) else function(x, *args)


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A pattern and the function that replaces it.

    ``outputs`` are the traced results; the first is the root, from which all others are reached. A constant
    that is callable is called with the match and gives the argument's value. ``calls`` has the operations of
    ``graph``; its other nodes are holes, and expressions over shapes and dtypes.
    """

    name: str
    function: Callable
    to: Callable
    where: Callable | None
    constants: dict[str, Any]
    graph: fx.Graph = field(repr=False)
    calls: dict[Node, Call] = field(repr=False)
    outputs: tuple[Node, ...] = field(repr=False)
    holes: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def root(self) -> Node:
        return self.outputs[0]

    @property
    def size(self) -> int:
        return len(self.calls)

    @property
    def line(self) -> str:
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"


def declare(
    function: Callable,
    *,
    to: Callable,
    where: Callable | None = None,
    name: str | None = None,
    **constants: Any,
) -> Rewrite:
    """Trace ``function`` into a ``Rewrite``.

    Args:
        function: the pattern; positional parameters only.
        to: called in the pattern's place, with the holes by name and ``constants``.
        where: a guard, called with the match; it states its conditions by ``require``.
        constants: further arguments of ``to``; a callable is called with the match.

    Raises:
        PatternError: naming the argument that ``to`` does not know or still lacks.
    """
    if not inspect.isfunction(function):
        raise PatternError(
            f"rewrite: a pattern is a plain function, got {type(function).__name__} {function!r}."
        )
    if not isinstance(name, (str, NoneType)):
        raise PatternError(f"{function.__name__}: `name` is {name!r}; give a string, or leave it out.")
    name = name or function.__name__
    _check_functions(name, to, where)
    holes = _holes(name, function)
    _check_arguments(name, to, holes, constants)
    graph, outputs = _trace(name, function)
    used = {n.target for n in graph.find_nodes(op="placeholder") if n.users}
    for hole in holes:
        if hole not in used:
            raise PatternError(
                f"{name}: parameter `{hole}` is not used in the pattern, so nothing could bind it."
            )
    calls = {n: call for n in graph.nodes if not is_metadata(n) and (call := _pattern_call(n)) is not None}
    return Rewrite(name, function, to, where, constants, graph, calls, outputs, holes)


def rewrite(
    *, to: Callable, where: Callable | None = None, name: str | None = None, **constants: Any
) -> Callable[[Callable], Rewrite]:
    """Decorator form of ``declare``, for the package's own passes."""

    def decorate(function: Callable) -> Rewrite:
        return declare(function, to=to, where=where, name=name, **constants)

    return decorate


def _pattern_call(node: Node) -> Call | None:
    """``canonical`` for a pattern's node; ``maybe`` stays a call of its own."""
    if node.op == "call_function" and node.target is maybe:
        return Call("maybe", node.args)
    return canonical(node)


def source_line(node: Node | None, fallback: str = "") -> str:
    """``file:line`` of the code that made ``node``, from its stack trace.

    It is the model's own where the model called one of our stand-ins for its layers.
    """
    trace = (node.meta.get("stack_trace") or node.stack_trace or "") if node is not None else ""
    frames = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
    if not frames:
        return fallback
    places = [frame.split('"', 2)[1:] for frame in frames]
    path, rest = next((p for p in reversed(places) if not p[0].startswith(_PACKAGE)), places[-1])
    return f"{path}:{rest.split('line ')[1].split(',')[0]}"


def _holes(name: str, function: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty:
            raise PatternError(
                f"{name}: parameter `{p}` must be a plain positional one: every parameter is a hole."
            )
    return tuple(p.name for p in parameters)


def _check_functions(name: str, to: Any, where: Any) -> None:
    if not callable(to):
        raise PatternError(f"{name}: `to` is {to!r}; give the function that replaces the pattern.")
    if where is not None and not callable(where):
        raise PatternError(
            f"{name}: `where` is {where!r}; give a function of the match that states conditions by "
            "rewriter.require(condition, reason), or leave it out."
        )


def _check_arguments(name: str, to: Callable, holes: tuple[str, ...], constants: dict[str, Any]) -> None:
    op = getattr(to, "__name__", repr(to))
    try:
        parameters = inspect.signature(to).parameters
    except ValueError as error:
        raise PatternError(f"{name}: the parameters of `{op}` are unknown; wrap it in a function.") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in (*holes, *constants):
        if argument not in parameters and not takes_any:
            near = get_close_matches(argument, parameters, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; it takes {', '.join(parameters)}."
            raise PatternError(f"{name}: `{argument}` is no argument of `{op}`{hint}")
    for p in parameters.values():
        given = p.name in holes or p.name in constants
        if not given and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise PatternError(
                f"{name}: `{op}` needs `{p.name}`, which is neither a parameter nor a constant."
            )


_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_NOT_A_PATTERN = (os.path.dirname(torch.__file__), __file__)


class _Tracer(fx.Tracer):
    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        # fx records lines too, but only of calls below a function named `forward`.
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(_NOT_A_PATTERN) and frame.f_back is not None:
            frame = frame.f_back
        code = frame.f_code
        node.stack_trace = f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        return node

    def create_arg(self, a: Any) -> Any:
        # `maybe` takes a function, which fx refuses as an argument.
        return a if inspect.isroutine(a) else super().create_arg(a)


def _trace(name: str, function: Callable) -> tuple[fx.Graph, tuple[Node, ...]]:
    try:
        graph = _Tracer().trace(function)
    except Exception as error:
        raise PatternError(f"{name}: cannot be traced without example inputs: {error}") from error
    result = next(iter(graph.find_nodes(op="output"))).args[0]
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    for output in outputs:
        if not isinstance(output, Node) or output.op == "placeholder":
            raise PatternError(f"{name}: returns {output!r}; a pattern returns what it computes.")
    reached = _ancestors(outputs[0])
    for output in outputs[1:]:
        if output not in reached:
            raise PatternError(
                f"{name}: its first result must be computed from the others; `{output}` is not used."
            )
    return graph, tuple(outputs)


def _ancestors(node: Node) -> set[Node]:
    seen, stack = set(), [node]
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


def evaluate(expression: Any, env: dict[Node, Any]) -> Any:
    """The value of a metadata expression of a pattern, as ``x.shape[-1] // 2``, under the bindings ``env``.

    Raises:
        KeyError: while something that it needs is not bound yet.
    """
    if isinstance(expression, slice):
        return slice(*(evaluate(a, env) for a in (expression.start, expression.stop, expression.step)))
    if isinstance(expression, (tuple, list)):
        return type(expression)(evaluate(a, env) for a in expression)
    if not isinstance(expression, Node):
        return expression
    if expression in env:
        bound = env[expression]
        return bound.meta["example_value"] if isinstance(bound, Node) else bound
    if expression.op == "placeholder" or not is_metadata(expression):
        raise KeyError(expression)
    args = evaluate(tuple(expression.args), env)
    if expression.op == "call_method":
        return getattr(args[0], str(expression.target))(*args[1:])
    function: Any = expression.target
    return function(*args)


def same(a: Any, b: Any) -> bool:
    """Equality that never installs a guard on a symbolic size."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, slice) and isinstance(b, slice):
        return all(same(getattr(a, k), getattr(b, k)) for k in ("start", "stop", "step"))
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(a, symbolic) or isinstance(b, symbolic):
        return str(a) == str(b)
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return type(a) is type(b) and a == b or _same_number(a, b)


def _same_number(a: Any, b: Any) -> bool:
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return numbers and not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b)
