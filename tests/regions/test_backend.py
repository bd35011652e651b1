"""Where the backend outlines and where it does not."""

import torch

import rewriter
from tests.regions.chains import Chain

CHAIN = Chain((), ("attention", "residual"), 3, ("tuple",))


def run(**settings) -> torch.Tensor:
    """The loss of ``CHAIN`` through the backend."""
    torch._dynamo.reset()
    compiled = torch.compile(CHAIN, backend="rewriter", **settings)
    return compiled(*CHAIN.inputs())[0]


def test_layers_are_outlined_by_default():
    with rewriter.inspect() as report:
        run(options={"lowering": "eager"})
    assert [(r.name, r.times) for r in report.program.regions] == [
        ("beginning", 1),
        ("layer_a", 3),
        ("end", 1),
    ]


def test_one_flat_graph_can_be_asked_for():
    with rewriter.inspect() as report:
        run(options={"lowering": "eager", "regions": False})
    assert report.program is None and report.graphs[0].notes == []


def test_cuda_graphs_keep_the_graph_whole_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr("rewriter.backend.lower", lambda module, *_: module.forward)
    with rewriter.inspect() as report:
        run(mode="reduce-overhead")
    assert report.program is None
    assert "CUDA graphs" in report.graphs[0].notes[0]


def test_outlining_that_fails_is_reported_and_the_graph_is_compiled_whole(monkeypatch):
    def broken(*_):
        raise ValueError("no")

    monkeypatch.setattr("rewriter.arrangement.outline", broken)
    with rewriter.inspect() as report:
        loss = run(options={"lowering": "eager"})
    assert loss.isfinite()
    assert report.graphs[0].notes == ["compiled as one region: outlining failed: ValueError: no"]
