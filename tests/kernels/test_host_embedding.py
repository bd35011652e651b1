"""``host_embedding`` gives the rows of a table bit for bit, and refuses one that is trained."""

import pytest
import torch
import torch.nn.functional as F

from rewriter.kernels.host_embedding import host_embedding

device = "cuda" if torch.cuda.is_available() else "cpu"


def table(rows=37, hidden=72, dtype=torch.bfloat16):
    made = torch.randn(rows, hidden).to(dtype)
    return made.pin_memory() if device == "cuda" else made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 13), (2, 3, 5), (7,), (0, 4)])
@pytest.mark.parametrize("hidden", [72, 1, 2049])
def test_rows_are_the_tables_own(shape, hidden, dtype):
    weight, ids = table(hidden=hidden, dtype=dtype), torch.randint(37, shape)
    found = torch.ops.rewriter.host_embedding(ids.to(device), weight)
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), F.embedding(ids, weight), rtol=0, atol=0)


def test_a_table_and_ids_with_strides_are_read_in_place():
    weight, ids = table().t().contiguous().t(), torch.randint(37, (6, 4)).t()
    found = torch.ops.rewriter.host_embedding(ids.to(device), weight.to(device))
    torch.testing.assert_close(found.cpu(), F.embedding(ids, weight), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [-1, 37, 2**40])
def test_an_id_that_is_not_in_the_table_gives_nan_and_nothing_else_changes(wrong):
    weight, ids = table(), torch.tensor([3, wrong, 5])
    found = torch.ops.rewriter.host_embedding(ids.to(device), weight).cpu()
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], weight[[3, 5]].cpu(), rtol=0, atol=0)


def test_lengths_may_be_symbols_and_the_op_is_sound():
    weight = table(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda ids: torch.ops.rewriter.host_embedding(ids, weight) * 2, backend="aot_eager", fullgraph=True
    )
    for length in (3, 5, 8):
        ids = torch.randint(37, (2, length))
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        assert torch.equal(compiled(ids.to(device)).cpu(), F.embedding(ids, weight).cpu() * 2)
    torch.library.opcheck(torch.ops.rewriter.host_embedding.default, (ids.to(device), weight))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="trained"):
        host_embedding(torch.zeros(1, dtype=torch.int64), torch.zeros(2, 2, requires_grad=True))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        host_embedding(torch.zeros(1, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(TypeError, match="float32"):
        host_embedding(torch.zeros(1), torch.zeros(2, 2))
