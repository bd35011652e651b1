"""A GPU's rates, as they are measured for plans and profiles."""

import pytest
import torch

from rewriter.memory.measured import measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_named_without_its_index_is_measured_as_the_current_one():
    measured = measure("cuda")
    assert measured.name == torch.cuda.get_device_name(torch.cuda.current_device())
    assert measured.matrix_flops > measured.bandwidth > measured.to_host > 0
