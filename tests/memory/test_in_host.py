"""Weights in host memory that kernels read over the bus: what a graph without a plan says of them."""

import pytest
import torch
from torch import fx

import rewriter
from rewriter.huggingface import prepare
from rewriter.memory.in_host import over_the_bus
from tests.families import batch, build

GIB = 2**30


def _graph(*values):
    graph = fx.Graph()
    for i, value in enumerate(values):
        graph.placeholder(f"x{i}").meta["example_value"] = value
    graph.output(())
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("trained", "said"), [(True, "twice a step, 1.00 GiB"), (False, "once a step, 512.00 MiB")]
)
def test_bytes_are_told_that_a_step_reads_over_the_bus(trained, said):
    packed, x = torch.empty(GIB // 4, 1, dtype=torch.uint8), torch.empty(2, 2, requires_grad=trained)
    (note,) = over_the_bus(_graph(packed, x, packed), torch.device("cuda"))
    assert "512.00 MiB in 4 bits" in note and said in note and ("memory_budget" in note) == trained
    assert over_the_bus(_graph(packed, x), torch.device("cpu")) == []


def test_the_report_of_a_graph_without_a_plan_has_the_line(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("rewriter.arrangement.device_of", lambda _: torch.device("cuda"))
    model = build("llama", layers=2, lora=True, nf4=True)
    prepare(model, host="layers")
    model.compile(backend="rewriter", options={"lowering": "eager", "memory_budget": "off"})
    with torch.no_grad():
        model(**batch())
    (graph,) = rewriter.report().graphs
    assert sum("kernels read them over the bus once a step" in note for note in graph.notes) == 1
    torch._dynamo.reset()
