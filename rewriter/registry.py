"""The patterns that users add: ``@rewriter.rewrite(to=...)`` on a function of their own."""

from collections.abc import Callable
from typing import Any

from rewriter.pattern import PatternError, Rewrite, declare

# In the order of their declaration; a pattern declared again under its name replaces the older one, so that
# a notebook's cell can be run twice.
_patterns: dict[str, Rewrite] = {}


def rewrite(
    function: None = None,
    /,
    *,
    to: Callable | None = None,
    where: Callable | None = None,
    name: str | None = None,
    **constants: Any,
) -> Callable[[Callable], Rewrite]:
    """Teach the compiler a pattern of your own, active from here on.

        @rewriter.rewrite(to=my_kernel, where=rows_fit)
        def scaled_norm(x, weight, eps):
            ...plain PyTorch, as the model writes it...

    Args:
        function: never given; there to tell who left out the parentheses.
        to: the function that replaces it; the pattern's parameters are its arguments, by name. It must be
            traceable by ``torch.compile`` or call a custom op.
        where: a guard ``f(match)``, which states conditions by ``rewriter.require(condition, reason)`` and
            returns nothing.
        name: the pattern's name in reports; the function's by default.
        constants: further arguments of ``to``.

    Returns:
        The decorator; the decorated name becomes the ``Rewrite``, which can be called like the function.

    Raises:
        PatternError: for a pattern that is no function, cannot be traced, has the name of one of the
            package's passes, or whose names do not fit ``to``; and where ``to`` is missing.
    """
    if function is not None:
        given = getattr(function, "__name__", repr(function))
        raise PatternError(
            f"rewrite: got `{given}` and not what replaces a pattern; write @rewriter.rewrite(to=...) above "
            f"the pattern, with the replacing function for the dots."
        )
    if to is None:
        raise PatternError(
            "rewrite: `to` is missing; write @rewriter.rewrite(to=...), with the function that replaces the "
            "pattern for the dots."
        )

    def decorate(function: Callable) -> Rewrite:
        # The passes of the package import this module.
        from rewriter.passes import package_passes

        declared = declare(function, to=to, where=where, name=name, **constants)
        if declared.name in package_passes():
            raise PatternError(
                f"rewrite: {declared.name!r} is a pass of the package, and reports and the option passes go "
                "by name; give the pattern another: @rewriter.rewrite(to=..., name=...)."
            )
        _patterns[declared.name] = declared
        return declared

    return decorate


def user_patterns() -> tuple[Rewrite, ...]:
    """The patterns declared so far."""
    return tuple(_patterns.values())


def remove(pattern: Rewrite) -> None:
    """Forget a user's pattern; graphs compiled before keep it."""
    _patterns.pop(pattern.name, None)
