"""Random tensors, and the sizes and dtypes that every kernel is tried with."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = st.sampled_from([1, 2, 3, 7, 31, 64, 127, 128, 257, 1000, 1021, 4093, 8191, 8192]) | st.integers(1, 300)
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def drawn(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
