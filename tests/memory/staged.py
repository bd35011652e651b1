"""Runs a region by its stages: whole, or the row-wise ones tile by tile, as plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewriter.memory.stages import Stage, stages
from rewriter.regions.program import Region, link
from tests.regions.outlined import Outlined


def in_stages(region: Region, tile: int | None = None) -> Callable:
    """A function like ``region.module``; row-wise stages run in tiles of ``tile`` tokens and are joined again."""
    graph = region.module.graph
    (output,) = graph.find_nodes(op="output")
    parts = stages(region)

    def run(*values: Any) -> tuple:
        env = dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))
        for stage in parts:
            inputs = [env[n] for n in stage.inputs]
            results = in_tiles(stage, inputs, tile) if tile and stage.row_wise else stage.module(*inputs)
            env.update(zip(stage.outputs, results, strict=True))
        return tuple(env[n] for n in output.args[0])

    return run


def in_tiles(stage: Stage, inputs: Sequence[Any], tile: int) -> list[torch.Tensor]:
    """The results of a row-wise stage, from one run a tile; the last tile may be shorter."""
    lengths = {x.shape[d] for x, d in zip(inputs, stage.rows_in, strict=True) if d is not None}
    (length,) = lengths
    tiles = []
    for start in range(0, length, tile):
        count = min(tile, length - start)
        tiles.append(
            stage.module(
                *(
                    x if d is None else x.narrow(d, start, count)
                    for x, d in zip(inputs, stage.rows_in, strict=True)
                )
            )
        )
    return [
        torch.cat(results, d) for results, d in zip(zip(*tiles, strict=True), stage.rows_out, strict=True)
    ]


def program_in_stages(case: Outlined, tile: int | None = None) -> Callable:
    """The whole program, each region by its stages."""
    assert case.program is not None, case.reason
    return link(case.program, {region: in_stages(region, tile) for region in case.program.regions})
