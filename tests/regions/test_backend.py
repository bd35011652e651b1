"""Where the backend outlines and where it does not."""

import torch

import rewriter
from tests.families import batch, build


def compiled(**settings):
    torch._dynamo.reset()
    model = build("llama", layers=3)
    model.compile(backend="rewriter", **settings)
    return model


def test_layers_are_outlined_by_default():
    with rewriter.inspect() as report:
        compiled(options={"lowering": "eager"})(**batch())
    assert [(r.name, r.times) for r in report.program.regions] == [
        ("beginning", 1),
        ("layer_a", 3),
        ("end", 1),
    ]


def test_one_flat_graph_can_be_asked_for():
    with rewriter.inspect() as report:
        compiled(options={"lowering": "eager", "regions": False})(**batch())
    assert report.program is None and report.graphs[0].notes == []


def test_cuda_graphs_keep_the_graph_whole_and_the_report_says_so():
    with rewriter.inspect() as report:
        compiled(mode="reduce-overhead")(**batch())
    assert report.program is None
    assert "CUDA graphs" in report.graphs[0].notes[0]


def test_outlining_that_fails_is_reported_and_the_graph_is_compiled_whole(monkeypatch):
    def broken(*_):
        raise ValueError("no")

    monkeypatch.setattr("rewriter.backend.outline", broken)
    with rewriter.inspect() as report:
        loss = compiled(options={"lowering": "eager"})(**batch()).loss
    assert loss.isfinite()
    assert report.graphs[0].notes == ["compiled as one region: outlining failed: ValueError: no"]
