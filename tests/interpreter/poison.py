"""Memory that nobody has written is NaN, or the largest integer, inside of `poisoned`."""

from contextlib import contextmanager

import torch


@contextmanager
def poisoned():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # what is not deterministic is the reference's alone, which is not called in here
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
