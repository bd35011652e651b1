"""Weights in host memory on a GPU: read there bit for bit, gone from the device, and the same steps."""

import pytest
import torch

from rewriter.huggingface import prepare, restore
from rewriter.kernels.dequantize import dequantize_4bit
from rewriter.kernels.host_embedding import host_embedding
from rewriter.memory.pinned import HostSlab
from tests.families import batch, build
from tests.gpu.test_dequantize import random_weight
from tests.memory.budgeted import assert_near, steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIB = 2**20


def locked(tensor: torch.Tensor) -> tuple[torch.Tensor, HostSlab]:
    slab = HostSlab(tensor.nbytes, pin=True)
    assert slab.pinned and slab.bytes.is_pinned()
    return slab.bytes.view(tensor.dtype).view(tensor.shape).copy_(tensor), slab


def test_rows_are_read_from_locked_memory():
    table = torch.randn(64_128, 4096, dtype=torch.bfloat16, device="cuda")
    weight, _slab = locked(table)
    ids = torch.randint(64_128, (1, 8192), device="cuda")
    torch.testing.assert_close(host_embedding(ids, weight), table[ids], rtol=0, atol=0)


def test_rows_of_memory_that_is_not_locked_are_the_same():
    weight, ids = torch.randn(50, 64), torch.randint(50, (2, 9), device="cuda")
    assert torch.equal(host_embedding(ids, weight), weight.cuda()[ids])


def test_a_packed_weight_is_read_from_locked_memory():
    packed = random_weight(14336, 4096, True)
    data, _slab = locked(packed.data)
    hosted = packed._replace(data=data)
    expected = dequantize_4bit(packed, torch.bfloat16)
    torch.testing.assert_close(dequantize_4bit(hosted, torch.bfloat16), expected, rtol=0, atol=0)
    pageable = packed._replace(data=packed.data.cpu())
    torch.testing.assert_close(dequantize_4bit(pageable, torch.bfloat16), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("budget", "dtype"), [(None, torch.bfloat16), (1000 * MIB, torch.float32)])
def test_steps_are_the_same_with_less_on_the_device(budget, dtype):
    options = {} if budget is None else {"memory_budget": budget}
    given, found, taken = [batch(length=64, device="cuda")], [], []
    for host in ((), ("embedding", "layers")):
        torch._dynamo.reset()
        model = build("llama", lora=True, nf4=True, double_quant=True, dtype=dtype, device="cuda")
        before = torch.cuda.memory_allocated()
        prepare(model, host=host)
        taken.append(before - torch.cuda.memory_allocated())
        assert model.device.type == "cuda"
        model.compile(backend="rewriter", options=options)
        found.append(steps(model, given))
        restore(model)
        assert torch.cuda.memory_allocated() >= before - MIB
    assert taken[0] == 0 and taken[1] > 0
    (ours, theirs) = found
    assert ours[1]
    # Under a plan, layers whose weights come ahead run in stages, which round in other places.
    assert_near(ours, theirs, 0.0 if budget is None else 1e-4)
    if budget is None:
        assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())
