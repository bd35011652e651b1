"""Gradients that a recording lends, in use on other streams than the step's."""

import pytest
import torch

from rewriter.replay.capture import CudaRecorder
from tests.gpu.recorded import gradient_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def weight():
    """Of 16 MiB."""
    return torch.nn.Parameter(torch.ones(2048, 2048, device="cuda"))


@pytest.fixture
def busy():
    """A stream that does nothing else for some tenths of a second."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
    return stream


def test_what_is_dropped_while_another_stream_reads_it_is_not_overwritten_before(weight, busy):
    factor = torch.ones(2048, 2048, device="cuda")
    recorder = CudaRecorder(weight.device)
    recording = recorder.record(lambda factor, weight: ((weight * factor).sum(),), [factor, weight], [1])
    gradient = gradient_of(recording)
    address = gradient.data_ptr()
    busy.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(busy):
        torch.cuda._sleep(500_000_000)
        copy = gradient.clone()
    gradient.view(-1).record_stream(busy)
    del gradient
    factor.fill_(2.0)
    assert recorder.reclaim([weight])
    again = gradient_of(recording)
    assert again.data_ptr() == address, "lent"
    torch.cuda.synchronize()
    assert (copy == 1.0).all() and (again == 2.0).all()


def test_the_allocator_is_told_of_its_own_tensors_as_ever(weight):
    recorder = CudaRecorder(weight.device)
    torch.cuda.empty_cache()
    used, stream = torch.empty_like(weight), torch.cuda.Stream()
    address = used.data_ptr()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
    used.record_stream(stream)
    del used
    assert torch.empty_like(weight).data_ptr() != address
    assert not recorder.lender.take_streams()
