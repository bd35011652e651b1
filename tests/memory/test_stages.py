"""What becomes of a region: its stages, on functions of a few lines."""

import torch
import torch.nn.functional as F
from torch import nn

from rewriter.memory.stages import stages
from tests.memory.staged import in_stages, traced


def _region(function, *inputs, **settings):
    region, values = traced(function, *inputs, **settings)
    return region, tuple(values.values())


def _attend(x):
    return F.scaled_dot_product_attention(x, x, x)


def _assert_runs(region, values):
    want = region.module(*values)
    for tile in (None, 3):
        torch.testing.assert_close(in_stages(region, tile)(*values), tuple(want))


def test_work_that_depends_on_weights_alone_is_done_in_each_stage_that_reads_it():
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))

    def function(x, w):
        doubled = w * 2
        return F.linear(_attend(F.linear(x, doubled)), doubled)

    region, values = _region(function, x, w)
    parts = stages(region)
    assert [s.row_wise for s in parts] == [True, False, True]
    assert all("mul" in str(s.module.graph) for s in (parts[0], parts[2]))
    _assert_runs(region, values)


def test_what_no_path_through_attention_needs_waits_for_its_reader():
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))
    region, values = _region(lambda x, w: F.linear(x, w) + _attend(x * 2), x, w)
    first, _, last = stages(region)
    assert "linear" not in str(first.module.graph) and "linear" in str(last.module.graph)
    _assert_runs(region, values)


def test_attention_written_out_is_one_whole_stage():
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))

    def function(x, w):
        q = F.linear(x, w)
        return F.linear(F.softmax(q @ q.transpose(1, 2) / 4, dim=-1) @ q, w)

    region, values = _region(function, x, w)
    assert [s.row_wise for s in stages(region)] == [True, False, True]
    _assert_runs(region, values)


def test_modes_are_those_of_the_region_in_every_stage():
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))

    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = _attend(F.linear(x, w))
        with torch.no_grad():
            z = F.linear(x, w)
        return F.linear(y.float(), w) + z

    region, values = _region(function, x, w)
    first, _, last = stages(region)
    assert "enter_autocast" in str(first.module.graph) and "set_grad_enabled" in str(last.module.graph)
    results = in_stages(region)(*values)
    assert results[0].requires_grad
    torch.testing.assert_close(results, tuple(region.module(*values)))


def test_a_write_in_place_stays_in_its_stage():
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))
    region, values = _region(lambda x, w: _attend(F.linear(x, w).mul_(2)).add_(1) * 2, x, w)
    assert len(stages(region)) > 1
    _assert_runs(region, values)


def test_a_write_into_what_another_stage_has_read_keeps_the_region_whole():
    def function(x, y):
        y.add_(_attend(x + y))
        return y * 2

    region, _ = _region(function, torch.randn(2, 8, 8), torch.randn(2, 8, 8))
    (only,) = stages(region)
    assert not only.row_wise and "writes in place into what other stages read" in only.reason


def test_a_read_before_a_write_in_place_stays_before_it():
    def function(x, y):
        tripled = y * 3
        y.add_(_attend(x))
        return tripled, y * 2

    region, values = _region(function, torch.randn(2, 8, 8), torch.randn(2, 8, 8))
    want = region.module(*(v.clone() for v in values))
    assert len(stages(region)) > 1
    torch.testing.assert_close(in_stages(region, 3)(*(v.clone() for v in values)), tuple(want))


def test_a_region_without_activations_is_whole():
    region, _ = _region(lambda x: x * 2, torch.randn(4, 4))
    (only,) = stages(region)
    assert not only.row_wise and only.reason == "it reads no activations"


def test_a_table_that_is_made_inside_is_made_once_for_all_tiles():
    x, positions = torch.randn(2, 8, 8), torch.arange(8.0)[:, None]
    region, values = _region(lambda x, p: x * torch.cos(p * torch.ones(8)), x, positions)
    first, last = stages(region)
    assert not first.row_wise and last.row_wise and "it depends on no token" in first.reason
    _assert_runs(region, values)
