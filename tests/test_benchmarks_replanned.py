"""The benchmarks that run many plans of one compiled model: their dry runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples/benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts import each other as scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


def test_predictions_and_offloading_run_the_plans_of_a_model_that_is_compiled_once(monkeypatch, tmp_path):
    import offloading
    import predictions

    made, own = [], predictions.compiled_once

    def compiled_once(*given):
        made.append(own(*given))
        return made[-1]

    monkeypatch.setattr(predictions, "compiled_once", compiled_once)
    monkeypatch.setattr(sys, "argv", ["predictions.py", "--tiny", "--results", str(tmp_path)])
    predictions.main()
    found = json.loads((tmp_path / "predictions.json").read_text())
    (point,) = found["points"]
    assert point["foreseen_gib"] <= point["allowed_gib"] and point["seconds"]
    assert found["verdict"]["points"] == 1

    monkeypatch.setattr(offloading, "compiled_once", lambda *_: made[0])
    monkeypatch.setattr(sys, "argv", ["offloading.py", "--tiny", "--results", str(tmp_path)])
    offloading.main()
    (row,) = json.loads((tmp_path / "offloading.json").read_text())["lengths"]
    assert row["host_gib"] > 0 and row["seconds"] and row["seconds_resident"]
    assert row["tokens"] == point["tokens"]
