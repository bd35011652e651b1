"""What the benchmarks rest on: cases by name, losses held to eager's, tables that say which runs compare."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples/benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts import each other as scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    ["8x2x2048", "32x2x128-255", "8x2x2048_16bit", "2x2x2048_full", "16x4x2048_1b_16bit", "80x1x4096_70b"],
)
def test_a_case_is_its_name(name):
    from models import Case

    assert Case.parse(name).name == name


def test_a_name_that_is_no_case_is_an_error_with_the_form():
    from models import Case

    with pytest.raises(ValueError, match="'8x2' is not <layers>x<rows>x<tokens>"):
        Case.parse("8x2")


@pytest.mark.parametrize("name", ["2x1x32_70b", "2x1x32_1b_16bit", "2x1x32_full"])
def test_all_of_a_models_tensors_have_values_and_its_ties_stay(name):
    import torch
    from models import Case, model_of

    model = model_of(Case.parse(name), "cpu", tiny=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(t.is_meta for t in tensors) and all(torch.isfinite(t.float()).all() for t in tensors)
    whole = dict(model.named_parameters(remove_duplicate=False))
    head, embedding = (next(p for n, p in whole.items() if part in n) for part in ("lm_head", "embed_tokens"))
    assert (head is embedding) == ("1b" in name)
    assert head.std().item() == pytest.approx(0.02, rel=0.02)
    packed = [n for n, p in whole.items() if p.dtype == torch.uint8]
    assert len(packed) == (14 if "70b" in name else 0)


def test_a_layer_is_done_with_before_the_next_has_weights_and_its_weights_are_the_same(monkeypatch):
    import models
    import torch

    order, made = [], []

    def fill(model, part, device, filled=models.fill):
        order.append("filled")
        filled(model, part, device)

    def keep_and_drop(layer):
        order.append("made")
        made.append([p.clone() for p in layer.parameters()])
        layer.to("meta")

    case = models.Case.parse("3x1x32")
    plain = models.base_model(case, "cpu", tiny=True)
    monkeypatch.setattr(models, "fill", fill)
    models.base_model(case, "cpu", tiny=True, made=keep_and_drop)
    assert order == [*["filled", "made"] * 3, "filled"]
    for layer, weights in zip(plain.model.layers, made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), weights, strict=True))


def test_every_suite_names_cases_and_systems_that_there_are():
    from models import Case
    from peers import SYSTEMS
    from suites import SUITES

    for jobs in (jobs for suite in SUITES.values() for jobs in suite):
        case = Case.parse(jobs.case)
        assert set(jobs.systems) <= set(SYSTEMS) and next(iter(jobs.systems)) == "rewriter"
        assert {"hf", "hf_gc"} & set(jobs.systems), "losses are held to eager's"
        assert case.shrunk().weights == case.weights


def test_losses_agree_within_the_rounding_of_bf16_and_no_further():
    from agreement import agreement

    eager = [12.6 - 0.04 * step for step in range(24)]
    near = agreement([loss + 0.002 for loss in eager], eager, tokens=4096)
    assert near["agree"] and near["steps"] == 20 and near["largest"] == 0.002
    assert not agreement([*eager[:10], 12.3], eager, tokens=4096)["agree"]
    assert agreement([loss + 0.01 for loss in eager], eager, tokens=256)["agree"]


def result(system, run="a", **more):
    losses = [12.0] * 24
    times = {"median_ms": 80.0, "peak_gib": 8.0, "first_step_s": 9.0}
    versions = {"torch": "2.11.0", "unsloth": "absent"}
    return {"system": system, "case": "8x2x2048", "run": run, "device": "H200", "versions": versions,
            "losses": losses, **times, **more}  # fmt: skip


def write(folder, *results):
    for r in results:
        (folder / f"end_to_end_{r['case']}_{r['system']}.json").write_text(json.dumps(r))


def test_a_suites_results_are_told_how_they_agree_with_eager_of_the_same_run(tmp_path):
    from end_to_end import result_file
    from models import Case
    from suites import settled

    case = Case.parse("8x2x2048")
    off = result("unsloth", losses=[12.5] * 24)
    write(tmp_path, result("rewriter"), off, result("hf"), result("liger", run="yesterday"))
    files = {s: result_file(tmp_path, case, s) for s in ("rewriter", "unsloth", "hf", "liger", "inductor")}
    found = settled(case, files, "a")
    assert set(found) == {"rewriter", "unsloth", "hf"}
    assert found["rewriter"]["eager"]["agree"] and not found["unsloth"]["eager"]["agree"]
    assert json.loads(files["rewriter"].read_text())["eager"]["system"] == "hf"


def test_the_table_marks_results_of_other_runs(tmp_path):
    from results import load
    from table import markdown

    write(tmp_path, result("hf", run="b", median_ms=120.0), result("rewriter"), result("unsloth"))
    lines = markdown(load(tmp_path)).splitlines()
    assert lines[2] == "| 8 layers, 2 × 2048, QLoRA | `rewriter` | 80.0 | 1.00 | 8.00 | 1.00 | 9.0 | – |"
    assert lines[3].startswith("|  | eager † | 120.0 | 1.50 |")
    assert lines[4].startswith("|  | Unsloth | 80.0 | 1.00 |")
    assert lines[-1] == "Measured on H200; torch 2.11.0."


def test_tables_show_first_steps_where_they_were_measured(tmp_path):
    from models import Case
    from results import load
    from suites import table
    from table import markdown

    runs = [result("rewriter", first_step_s=None), result("hf", first_step_s=None)]
    write(tmp_path, *runs)
    assert "first step" not in markdown(load(tmp_path))
    assert "–" in table(Case.parse("8x2x2048"), {r["system"]: r for r in runs})
    write(tmp_path, result("hf"))
    lines = markdown(load(tmp_path)).splitlines()
    assert lines[2].endswith("| 80.0 | 1.00 | 8.00 | 1.00 | – | – |")
    assert lines[3].endswith("| 80.0 | 1.00 | 8.00 | 1.00 | 9.0 | – |")


def test_the_results_that_are_here_make_the_readmes_tables():
    from results import FOLDER, load
    from table import README, markdown, overhead, regions

    first_steps, calls = (
        json.loads((FOLDER / f"{name}.json").read_text()) for name in ("regions", "regions_overhead")
    )
    for table in (markdown(load(FOLDER)), regions(first_steps), overhead(calls)):
        assert table in README.read_text()


def long_run(card, tokens, peak, host, case=None):
    plan = {"peak_gib": peak, "host_gib": host}
    return {"system": "rewriter", "case": case or f"32x1x{tokens}", "card_gib": card, "tokens": tokens,
            "seconds": [1.0], "tokens_per_s": tokens, "peak_gib": peak, "reserved_gib": peak, "plan": plan,
            "device": "H200", "versions": {"torch": "2.11.0"}}  # fmt: skip


def test_what_a_token_takes_is_the_slope_over_the_longest_rows_of_three_cards():
    from context_table import markdown

    hidden = 2**13 / 2**30
    runs = [long_run(card, n, 6.5 + 10 * n * hidden, 64 * n * hidden)
            for card, n in ((12, 50_000), (16, 100_000), (24, 200_000))]  # fmt: skip
    others = [long_run(24, 50_000, 22, 100), long_run(16, 200_000, 90, 100, "8x1x200000")]
    text = "over 50,000, 100,000 and 200,000 tokens, a token takes 10.0 hidden states of bf16 on the device"
    assert text in markdown(runs + others) and "and 64.0 in host memory" in markdown(runs + others)
    assert "a token takes" not in markdown(runs[1:] + others)


def test_every_case_of_the_kernels_is_in_one_share_of_what_is_compiled_ahead():
    import ahead

    shares = ahead.shares(3, ["inductor", "liger"])
    own = [range(20)[int(first) :: int(step)] for kind, first, step in shares if kind == "cases"]
    assert sorted(case for share in own for case in share) == list(range(20))
    assert [share for share in shares if share[0] != "cases"] == [("liger", "0", "1")]
    assert not ahead.shares(0, ["liger"])


def test_a_system_is_asked_for_by_its_name_alone_or_in_one_suite():
    from suites import asked

    only = ["rewriter", "deep:unsloth_gc"]
    assert asked(None, "deep", "hf") and asked(only, "deep", "rewriter") and asked(only, "deep", "unsloth_gc")
    assert not asked(only, "long", "unsloth_gc") and not asked(only, "deep", "hf")
