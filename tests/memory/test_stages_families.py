"""Layers of real models in stages: which there are; they compute the same, whole and tile by tile."""

import contextlib
from typing import Any

import pytest
import torch

from rewriter.canonical import value_of
from rewriter.memory.stages import stages
from tests.families import batch, build
from tests.memory.staged import program_in_stages
from tests.regions.outlined import Outlined, numbers, outlined

# Odd, so that no length is one tile's multiple.
LENGTH, TILE = 15, 4
# Row-wise stages as r, whole ones as w.
DECODER = "rwr"
ROUTED = "rwrwr"

FAMILIES = {
    "llama": [DECODER],
    "falcon": [DECODER],
    "deepseek_v3": [ROUTED],
    "mixtral": [ROUTED],
}
ALTERNATING = {
    # Its cosines of full attention are made in the layer, once for all tiles.
    "gemma3": [DECODER, "wrwr"],
    "lfm2": [DECODER, DECODER],
}


def _batch(rows: int = 2) -> dict[str, Any]:
    return batch(rows=rows, length=LENGTH)


def _shapes(case: Outlined) -> list[str]:
    assert case.program is not None, case.reason
    layers = [r for r in case.program.regions if r.name.startswith("layer")]
    return ["".join("r" if s.row_wise else "w" for s in stages(r)) for r in layers]


def _assert_same(case: Outlined, rtol: float = 2e-5) -> None:
    """Whole and in tiles; a sum over tiles is rounded otherwise than one over all tokens."""
    theirs = numbers(case.body, case.values)
    for tile in (None, TILE):
        ours = numbers(program_in_stages(case, tile), case.values)
        for a, b in zip(ours.results + ours.gradients, theirs.results + theirs.gradients, strict=True):
            if b is not None:
                assert (a - b).abs().max() <= rtol * b.abs().max(), tile


@pytest.mark.parametrize("name", [*FAMILIES, *ALTERNATING])
def test_a_family_has_the_stages_of_the_table_and_computes_the_same(name):
    layers = 3 if name in FAMILIES else 4
    case = outlined(build(name, layers=layers), **_batch())
    assert _shapes(case) == (FAMILIES | ALTERNATING)[name]
    _assert_same(case)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": True, "nf4": True, "double_quant": True, "dynamic": True},
        {"lora": True, "rows": 1},
        {"lora": True, "nf4": True, "autocast": True},
    ],
    ids=lambda s: " ".join(k for k in s),
)
def test_a_decoder_layer_is_three_stages_whatever_its_weights(settings):
    settings = dict(settings)
    dynamic, rows = settings.pop("dynamic", None), settings.pop("rows", 2)
    lower = settings.pop("autocast", False)
    inside = torch.autocast("cpu", torch.bfloat16) if lower else contextlib.nullcontext()
    with inside:
        case = outlined(build("llama", layers=3, **settings), dynamic=dynamic, **_batch(rows))
        assert set(_shapes(case)) == {DECODER}
        _assert_same(case, 0.05 if lower else 2e-5)


def test_a_row_wise_stage_reads_the_length_from_its_tile():
    case = outlined(build("llama", layers=3), **_batch(), dynamic=True)
    assert case.program is not None, case.reason
    (layer,) = [r for r in case.program.regions if r.name.startswith("layer")]
    first, attention, last = stages(layer)
    assert first.rows_out == (2, 2, 2) and last.rows_out == (1, 1)
    assert attention.reason.endswith("attention") and not any(attention.rows_in)
    numbers_read = [n for s in (first, last) for n in s.inputs if isinstance(value_of(n), torch.SymInt)]
    lengths = {
        str(value_of(n).shape[1]) for n, rows in zip(first.inputs, first.rows_in, strict=True) if rows == 1
    }
    assert len(lengths) == 1 and not lengths & {str(value_of(n)) for n in numbers_read}
