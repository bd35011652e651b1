"""Lets ``TrainingArguments(torch_compile=True, torch_compile_backend="rewriter")`` name this backend.

Trainer hands that name to accelerate, which looks it up in an enumeration, ``DynamoBackend``, and raises for
any that is not in it; PyTorch, which would know the name by its entry point, is never asked. So the
enumeration is given a ``_missing_``, Python's hook for values that an ``Enum`` does not list, which answers
to "REWRITER" and passes every other name on. Nothing else of accelerate changes: it compares the member with
``NO``, and hands its value in lower case to ``torch.compile``. Where a release of accelerate has no such
enumeration of strings, it is left as it is.

accelerate is not imported for this, nor is ``import rewriter`` made to wait for it. Where it is loaded
already the hook is put in at once, else when it is loaded: by a finder that is asked for every module,
answers for one alone, and leaves when that one is loaded.
"""

import sys
from collections.abc import Sequence
from enum import Enum
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "accelerate.utils.dataclasses"
_NAME = "REWRITER"


def register() -> None:
    """Make accelerate take "rewriter" for a backend, now or when it is first imported."""
    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        _extend(loaded)
    else:
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(MetaPathFinder):
    """Finds accelerate's module where Python would, and extends it once its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_extend(module: ModuleType) -> None:
            run(module)
            _extend(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = run_and_extend
        return spec


def _extend(module: ModuleType) -> None:
    """Give the module's ``DynamoBackend`` a member that it does not list."""
    backends: Any = getattr(module, "DynamoBackend", None)
    if not {str, Enum} <= set(getattr(backends, "__mro__", ())):
        return
    # As enum.Flag makes the values that are not among its own.
    member: Any = str.__new__(backends, _NAME)
    member._name_ = member._value_ = _NAME
    others = backends._missing_

    def _missing_(cls: type[Enum], value: Any) -> Any:
        return member if value == _NAME else others(value)

    backends._missing_ = classmethod(_missing_)
