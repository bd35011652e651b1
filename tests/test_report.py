"""The report: what was rewritten, what was not and why, as text, numbers and JSON."""

import json

import torch
import torch.nn.functional as F

import rewriter
from rewriter.report import (
    GraphRecord,
    MatchRecord,
    MissRecord,
    PassRecord,
    Report,
    count_misses,
    count_places,
    forget,
    record_graph,
)

EAGER = {"lowering": "eager"}


def graph():
    matches = (MatchRecord("llama_norm", "/m/modeling.py:66", 3),)
    misses = (MissRecord("silu", "/p/gated.py:9", "/m/modeling.py:80", "`x` is also returned", 2),)
    passes = [PassRecord("norm", matches, (), 0.1), PassRecord("gated_mlp", (), misses, 0.2)]
    return GraphRecord("0/0", passes, 40, 31, None, ["a note"], {"rewriting": 0.3})


def compile_twice():
    torch._dynamo.reset()
    norm = torch.nn.LayerNorm(8)

    def block(x):
        return norm(norm(x)) + F.silu(x)

    torch.compile(block, backend="rewriter", options=EAGER)(torch.randn(2, 8))


def test_a_block_in_which_nothing_was_compiled_says_where_earlier_graphs_are():
    forget()
    with rewriter.inspect() as before:
        pass
    assert "Call the compiled model once" in str(before)
    record_graph(graph())
    with rewriter.inspect() as report:
        pass
    assert "Those that were compiled before are in rewriter.report()" in str(report)
    forget()


def test_an_inspection_outside_of_a_with_statement_prints_how_it_is_used():
    assert "with rewriter.inspect() as report: step(batch)" in str(rewriter.inspect())


def test_counts_sum_the_rewrites_of_each_pass_over_the_graphs():
    assert Report([graph(), graph()]).counts() == {"norm": 6, "gated_mlp": 0}


def test_a_report_becomes_json_and_back():
    data = json.loads(json.dumps(Report([graph()]).to_dict()))
    assert data["counts"] == {"norm": 3, "gated_mlp": 0}
    (entry,) = data["graphs"]
    assert entry["passes"][0]["matches"] == [
        {"rewrite": "llama_norm", "place": "/m/modeling.py:66", "count": 3},
    ]
    assert entry["passes"][1]["misses"][0]["reason"] == "`x` is also returned"


def test_the_text_names_passes_places_reasons_and_notes():
    text = str(Report([graph()]))
    assert "graph 0/0: 40 operations, 31 after rewriting" in text
    assert "a note" in text
    assert "modeling.py:66" in text and "/m/" not in text
    assert "gated_mlp at modeling.py:80 (×2): `x` is also returned" in text


def test_the_text_names_a_pass_that_failed_and_a_graph_break():
    failed = GraphRecord("0/0", [PassRecord("norm", (), (), 0.0, "ValueError: no")], 1, 1, "print at a.py:3")
    text = str(Report([failed]))
    assert "norm: left out, it failed: ValueError: no" in text
    assert "Dynamo ended this graph early: print at a.py:3" in text


def test_a_report_of_nothing_says_what_to_do():
    assert "Call the compiled model once" in str(Report())


def test_matches_of_one_line_are_one_record():
    sites = [("a", "m.py:1"), ("b", "m.py:2"), ("a", "m.py:1")]
    assert count_places(sites) == (MatchRecord("a", "m.py:1", 2), MatchRecord("b", "m.py:2", 1))


def test_misses_that_differ_in_a_nodes_number_alone_are_one_record():
    misses = [MissRecord("a", "p.py:1", "m.py:1", f"`mul_{i}` is also returned") for i in range(3)]
    (miss,) = count_misses(misses)
    assert (miss.reason, miss.count) == ("`mul` is also returned", 3)


def test_inspect_collects_what_is_compiled_inside_it_alone():
    with rewriter.inspect() as outer:
        with rewriter.inspect() as inner:
            compile_twice()
        record_graph(graph())
    record_graph(graph())
    assert len(inner.graphs) == 1
    assert len(outer.graphs) == 2


def test_the_process_keeps_a_report_until_dynamo_is_reset():
    forget()
    compile_twice()
    assert len(rewriter.report().graphs) == 1
    torch._dynamo.reset()
    assert rewriter.report().graphs == []


def test_a_match_names_the_line_of_the_model_and_how_often():
    with rewriter.inspect() as report:
        compile_twice()
    (norm,) = [p for p in report.graphs[0].passes if p.name == "norm"]
    assert norm.count == 2
    assert all(".py:" in m.place for m in norm.matches)


def test_a_miss_names_the_lines_of_the_pattern_and_of_the_model():
    with rewriter.inspect() as report:
        compile_twice()
    (gated,) = [p for p in report.graphs[0].passes if p.name == "gated_mlp"]
    (miss,) = gated.misses
    assert "gated_mlp.py:" in miss.pattern_line
    assert "test_report.py:" in miss.model_line


def test_a_graph_break_is_reported_with_dynamos_reason():
    torch._dynamo.reset()

    def broken(x):
        x = F.silu(x) + 1
        torch._dynamo.graph_break()
        return x * 2

    with rewriter.inspect() as report:
        torch.compile(broken, backend="rewriter", options=EAGER)(torch.randn(4))
    breaks = [g.graph_break for g in report.graphs]
    assert len(breaks) == 2
    assert breaks[0] is not None and "test_report.py:" in breaks[0]
    assert breaks[1] is None


def test_a_report_keeps_no_tensor_alive():
    with rewriter.inspect() as report:
        compile_twice()
    json.dumps(report.to_dict())
