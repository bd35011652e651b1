"""One guard for what the layers of a prepared model were traced by, in place of thousands.

Dynamo guards each attribute that a traced layer reads, and checks all of them at every call: 15,000 nodes of
a tree for 32 layers with LoRA over 4-bit weights, most of them far out of the processor's caches by then.
torch 2.11 on Python 3.12 passes over a module's whole subtree while no dictionary in it has changed, but not
where the tree holds a list, a dtype, or an attribute of a tensor: each LoRA layer had some of these.

Such facts are therefore told at tracing, as constants, by a function that Dynamo calls instead of tracing it,
and that function puts one guard on the root of the tree: it reads the facts of all layers again, in one loop,
and compares them by identity. Whatever is replaced fails it as it would have failed Dynamo's own guard. A
layer is known by its ``id``, which Dynamo guards; a copy, which no seal knows, is traced without one.

The guard also holds whether the parameters that a model was prepared with need gradients, which torch 2.11
does not look at in subtrees that it passes over: a frozen adapter kept its gradient, one that was no longer
frozen got none.

Layers that are compiled one by one, or are cut apart by graph breaks, share what is compiled; facts of one of
them, and its ``id``, would end that. They are traced without (``traced_as_a_whole``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch._guards import Guard

# By the ``id`` of a layer, which its seal keeps alive; and the one guard that all graphs under a seal have.
_seals: weakref.WeakValueDictionary[int, Seal] = weakref.WeakValueDictionary()
_guards: weakref.WeakKeyDictionary[Seal, Guard] = weakref.WeakKeyDictionary()
# By what is being traced: whether it is whole, which every layer asks.
_whole: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

Reader = Callable[[Sequence[nn.Module]], list[Any]]


class Seal:
    """What the layers of a model are traced by.

    Whoever prepares a model owns its seal: once that is gone, what was traced under it is traced anew.

    Args:
        kinds: of each kind of layer, the layers and what reads the facts of all of them, in order.
        parameters: those whose ``requires_grad`` is among the facts.
    """

    def __init__(
        self, kinds: Iterable[tuple[Sequence[nn.Module], Reader]], parameters: Iterable[nn.Parameter]
    ):
        self._kinds = tuple(kinds)
        self._parameters = tuple(p for p in parameters if p.is_floating_point())
        self.layers = {id(layer): layer for layers, _ in self._kinds for layer in layers}
        _seals.update(dict.fromkeys(self.layers, self))

    def facts(self) -> list[Any]:
        """The facts as they are now."""
        found: list[Any] = [p.requires_grad for p in self._parameters]
        for layers, read in self._kinds:
            found += read(layers)
        return found


class _Taken:
    """Facts as they were; those that can be are held weakly, so that a guard keeps no weight alive."""

    def __init__(self, facts: Sequence[Any]):
        self._length = len(facts)
        self._is_weak = [_can_be_held_weakly(fact) for fact in facts]
        self._is_other = [not weak for weak in self._is_weak]
        self._weak = [weakref.ref(fact) for fact in compress(facts, self._is_weak)]
        self._others = list(compress(facts, self._is_other))

    def are(self, facts: Sequence[Any]) -> bool:
        return (
            len(facts) == self._length
            and all(map(is_, compress(facts, self._is_other), self._others))
            and all(map(is_, compress(facts, self._is_weak), [held() for held in self._weak]))
        )


def _can_be_held_weakly(fact: Any) -> bool:
    return type(fact).__weakrefoffset__ != 0


def traced_as_a_whole() -> bool:
    """Whether what Dynamo traces now has all layers of a seal, if it has some of them."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    root = InstructionTranslator.current_tx().output.root_tx
    assert root is not None
    if root not in _whole:
        modules = (v for v in root.f_locals.values() if isinstance(v, nn.Module))
        inside = {id(layer) for module in list(modules)[:1] for layer in module.modules()}
        parts = (inside & seal.layers.keys() for seal in set(_seals.values()))
        counts = ((len(part), len(_seals[next(iter(part))].layers)) for part in parts if part)
        _whole[root] = all(some == every for some, every in counts)
    return _whole[root]


def sealed(layer: int) -> nn.Module | None:
    """The layer of this ``id`` if it has a seal, by which the graph being traced is then guarded.

    To be called by functions that Dynamo takes for constant: they may then tell facts of the layer.
    """
    # Imported by whoever traces, and slow to import.
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard

    seal = _seals.get(layer)
    if seal is None:
        return None
    if seal not in _guards:
        _guards[seal] = Guard(GlobalStateSource(), partial(_create, weakref.ref(seal)))
    install_guard(_guards[seal])
    return seal.layers[layer]


def _create(reference: weakref.ref[Seal], builder: Any, guard: Guard) -> None:
    seal = reference()
    assert seal is not None, "a model is alive while it is traced"
    taken = _Taken(seal.facts())

    def holds(_: Any) -> bool:
        seal = reference()
        return seal is not None and taken.are(seal.facts())

    text = "the layers of a prepared model are as they were when it was traced (rewriter)"
    builder.guard_manager.root.add_lambda_guard(holds, [text], guard.user_stack)
