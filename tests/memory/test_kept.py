"""What a region costs that is compiled as it is."""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rewriter.memory.kept import kept_graphs
from rewriter.memory.machine import H200
from rewriter.regions.program import Region


def _norm(x, weight, eps):
    """As it is traced with ``dynamic=True``: constants are tensors, and read off them."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps.item()) * weight,)


@pytest.mark.parametrize(("trained", "name"), [(True, "keep all"), (False, "nothing to keep")])
def test_a_region_that_reads_a_number_off_a_tensor_is_costed(trained, name):
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, eps = torch.empty(8, 16), torch.empty((), dtype=torch.float64)
        weight = torch.empty(16, requires_grad=trained)
    choice = kept_graphs(Region("r", fx.symbolic_trace(_norm), (x, weight, eps)), frozenset()).choice(H200)
    assert choice.name == name
    assert (choice.saved >= x.nbytes) == trained and choice.forward_peak >= 2 * x.nbytes
