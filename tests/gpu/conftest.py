"""What tests on a GPU share."""

import pytest
import torch


@pytest.fixture
def device():
    """Where a test's model is; after it neither compilations nor what the allocator cached are left."""
    yield "cuda"
    torch._dynamo.reset()
    torch.cuda.empty_cache()
