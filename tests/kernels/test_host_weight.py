"""``host_weight`` gives a weight bit for bit, copied ahead or when asked, and refuses a trained one."""

import pytest
import torch
import torch.nn.functional as F

from rewriter.kernels import host_weight as module
from rewriter.kernels.host_weight import COMING, host_weight

device = "cuda" if torch.cuda.is_available() else "cpu"


def weight(dtype=torch.bfloat16):
    made = torch.randn(37, 24).to(dtype)
    return made.pin_memory() if device == "cuda" else made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_copy_is_the_weight_on_the_other_tensors_device(dtype):
    given, x = weight(dtype), torch.randn(3, 24, device=device, requires_grad=True)
    found = torch.ops.rewriter.host_weight(x.detach(), given)
    assert found.device == x.device and found.data_ptr() != given.data_ptr() and not found.requires_grad
    torch.testing.assert_close(found.cpu(), given.cpu(), rtol=0, atol=0)


def test_a_copy_that_was_begun_is_waited_for_and_taken_once():
    given, x, waits = weight(), torch.randn(3, 24, device=device), []
    begun = given.to(device, copy=True)
    COMING[given.data_ptr()] = begun, lambda: waits.append(1)
    assert torch.ops.rewriter.host_weight(x, given) is begun or waits == [1]
    assert torch.ops.rewriter.host_weight(x, given).data_ptr() != begun.data_ptr()
    assert waits == [1] and not COMING


def test_a_copy_on_its_way_to_another_device_is_left_to_who_asks_there():
    given, x = weight(), torch.randn(3, 24, device=device)
    COMING[given.data_ptr()] = torch.empty(37, 24, device="meta"), lambda: None
    found = torch.ops.rewriter.host_weight(x, given)
    torch.testing.assert_close(found.cpu(), given.cpu(), rtol=0, atol=0)
    assert list(COMING) == [given.data_ptr()]
    COMING.clear()


def test_the_gradient_of_a_product_by_it_is_that_by_the_weight(monkeypatch):
    monkeypatch.setattr(module, "_is_copied", lambda x: True)
    given = weight(torch.float32)
    x, other = (torch.ones(3, 24, device=device, requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    torch.compiler.allow_in_graph(host_weight)
    compiled = torch.compile(
        lambda x: F.linear(x, host_weight(x, given)).square().sum(), backend="aot_eager", fullgraph=True
    )
    compiled(x).backward()
    F.linear(other, given.to(device)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)
    torch.library.opcheck(torch.ops.rewriter.host_weight.default, (x.detach(), given))


def test_where_nothing_is_to_be_copied_it_is_the_weight_itself():
    given = weight()
    assert host_weight(torch.randn(2, 24), given) is given


def test_a_trained_weight_is_refused():
    with pytest.raises(ValueError, match="trained"):
        host_weight(torch.randn(2, 24), torch.randn(3, 24, requires_grad=True))
