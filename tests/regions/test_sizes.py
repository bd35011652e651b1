"""Sizes that are computed in every layer: equal ones do not tie the layers together."""

import torch
from torch import nn

from tests.regions.outlined import assert_equal, numbers, outlined, run_program


class Layer(nn.Module):
    """Views by a ``torch.Size`` that is made of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(16, 32), nn.Linear(8, 8), nn.Linear(32, 16)

    def forward(self, x):
        wide = torch.tanh(self.up(x))
        heads = self.mix(wide.view(wide.size()[:-1] + (4, 8))).softmax(-1)
        return x + self.down(heads.reshape(heads.size()[:-2] + (32,)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def test_layers_that_view_by_a_computed_size_are_outlined_and_run_in_order():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, requires_grad=True)
    case = outlined(Chain(), x, dynamic=True)
    assert case.program is not None and "a a" in case.order
    made: set = set()
    for call in case.program.calls:
        assert all(n in made or n.op in ("placeholder", "get_attr") for n in call.inputs)
        made.update(call.outputs)
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))
