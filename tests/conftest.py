"""What every test shares: fixed seeds, and Triton's interpreter where there is no GPU."""

import os

# Inductor takes the processor's word for its vector instructions, in place of six test compilations.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
