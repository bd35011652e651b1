"""What every test shares: fixed seeds, Triton's interpreter without a GPU, and less work beside the tests."""

import gc
import logging
import os

# Inductor takes the processor's word for its vector instructions, in place of six test compilations.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Traces are many objects that live long; by Python's own thresholds an eighth of all time goes over them.
    gc.set_threshold(50_000, 20, 10)

import pytest  # noqa: E402
import torch._dynamo.guards  # noqa: E402

# For a statistic, Dynamo would empty the processor's cache after each compilation, which takes 50 ms.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


# pytest listens to each logger that does not propagate. While anybody listens to this one, PyTorch writes out
# as text all that it compiles.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
