"""Lengths that vary: few compilations, and the same numbers at each."""

import random

import torch

import rewriter
from tests.families import batch, build


def _compiled(layers: int, **settings):
    torch._dynamo.reset()
    model = build("llama", layers=layers)
    model.compile(backend="rewriter", options={"lowering": "eager"}, **settings)
    return model


def test_random_lengths_compile_two_graphs_and_a_batch_of_one_a_third():
    model, plain = _compiled(2), build("llama", layers=2)
    draw = random.Random(0)

    def run(rows: int, length: int) -> None:
        loss = model(**batch(rows=rows, length=length)).loss
        loss.backward()

    with rewriter.inspect() as report:
        for _ in range(14):
            run(draw.randint(2, 6), draw.randint(4, 40))
        assert len(report.graphs) <= 2
        run(1, 12)
        run(1, 23)
        assert len(report.graphs) <= 3
    with rewriter.inspect() as report, torch.no_grad():
        for _ in range(5):
            model(**batch(rows=draw.randint(2, 6), length=draw.randint(4, 40)))
    known = len(report.graphs)
    with rewriter.inspect() as report:
        for _ in range(40):
            model(**batch(rows=draw.randint(2, 6), length=draw.randint(4, 40)))
    assert known <= 2 and not report.graphs
    ours, theirs = (m(**batch(rows=3, length=17)).loss for m in (model, plain))
    torch.testing.assert_close(ours, theirs)


def test_all_lengths_may_vary_from_the_start():
    model, plain = _compiled(3, dynamic=True), build("llama", layers=3)
    with rewriter.inspect() as report:
        for rows, length in ((2, 8), (3, 19), (5, 11)):
            model.zero_grad()
            plain.zero_grad()
            inputs = batch(rows=rows, length=length)
            model(**inputs).loss.backward()
            plain(**inputs).loss.backward()
            ours, theirs = model.lm_head.weight.grad, plain.lm_head.weight.grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(report.graphs) == 1
    assert [r.times for r in report.program.regions] == [1, 3, 1]
