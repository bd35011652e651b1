"""Ops launch on the GPU that their tensors are on, whichever is the current one."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rewriter.kernels import registration, rms_norm  # noqa: F401
from rewriter.kernels.registration import launchers


@pytest.fixture
def current():
    """The number of the current GPU, as a launch would find it."""
    found = SimpleNamespace(index=0)

    class DeviceOf:
        def __init__(self, tensor):
            self.index = tensor.device.index

        def __enter__(self):
            self.index, found.index = found.index, self.index

        def __exit__(self, *_):
            found.index = self.index

    with patch.object(registration.torch.cuda, "device_of", DeviceOf):
        yield found


def tensors(*devices: str) -> list[torch.Tensor]:
    # Where there is a GPU, a fake tensor begins its context; there may be no second one.
    with FakeTensorMode(), patch.object(torch.cuda, "is_available", return_value=False):
        return [torch.empty(2, device=device) for device in devices]


@pytest.mark.parametrize("devices", [("cuda:1",), ("cpu", "cuda:1"), ("cuda:1", "cpu")])
def test_a_kernel_is_launched_where_its_tensors_are(current, devices):
    launching = registration.on_its_device(lambda *given: (current.index, *given))
    given = tensors(*devices)
    assert launching(*given, None, 1e-5) == (1, *given, None, 1e-5)
    assert current.index == 0
    assert registration.on_its_device(lambda *, x: current.index)(x=given[devices.index("cuda:1")]) == 1


def test_a_kernel_of_tensors_in_host_memory_stays_where_it_is(current):
    assert registration.on_its_device(lambda x: current.index)(*tensors("cpu")) == 0


def test_every_op_that_launches_does_so_on_its_device():
    op, kernel = next((op, kernel) for op, kernel in launchers.items() if "rms_norm" in str(op))
    called = []
    with (
        patch.object(registration.library, "impl", lambda name, function, key: called.append(function)),
        patch.object(registration.library, "define"),
        patch.object(torch.library, "register_fake"),
    ):
        registration.define(op._schema.name.removeprefix("rewriter::") + "()", kernel=kernel, fake=kernel)
    assert called and called[0].__wrapped__ is kernel
