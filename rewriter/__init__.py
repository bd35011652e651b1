"""rewriter: a torch.compile backend that makes Hugging Face models train faster, in less memory.

model.compile(backend="rewriter")
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rewriter.accelerate_entry import register as _register_with_accelerate
from rewriter.check import CheckError, check
from rewriter.huggingface import prepare, restore
from rewriter.pattern import PatternError, maybe, require
from rewriter.profile import Profile, profile
from rewriter.registry import rewrite
from rewriter.report import Report, inspect, report

if TYPE_CHECKING:
    from rewriter.foresee.foresight import plan

__all__ = [
    "CheckError",
    "PatternError",
    "Profile",
    "Report",
    "check",
    "inspect",
    "maybe",
    "plan",
    "prepare",
    "profile",
    "report",
    "require",
    "restore",
    "rewrite",
]

_register_with_accelerate()


class _Package(ModuleType):
    """This package, which a caller may take for the backend."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        # To compile here would be late: the backend's module sets what Dynamo traces the first graph by.
        raise TypeError(
            "rewriter: backend=rewriter is the package, not a backend; give its name, backend='rewriter'."
        )

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        # By its name, as cloudpickle and dill take modules, which they know by their exact type.
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Planning loads Dynamo, which training loads later, and importing this should not.
    if name == "plan":
        from rewriter.foresee.foresight import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
