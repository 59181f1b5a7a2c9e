from __future__ import annotations

import pytest
import torch

from expt.memory.recovery.attempt import shortage
from expt.units import GIB, MIB

TORN = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which 1.00 GiB is free. Including non-PyTorch memory, this process has 22.00 GiB memory in "
    "use. Of the allocated memory 12.00 GiB is allocated by PyTorch, and 9.50 GiB is reserved by "
    "PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("error", "cause", "requested", "free"),
    [
        (torch.OutOfMemoryError(TORN), "fragmentation", 2 * GIB, GIB),
        (torch.OutOfMemoryError("no figures"), "full", None, None),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB"),
            "full",
            512 * MIB,
            None,
        ),
        (MemoryError(), "unknown", None, None),
        (
            MemoryError("Unable to allocate 2.00 GiB for an array with shape (2,)"),
            "unknown",
            2 * GIB,
            None,
        ),
    ],
)
def test_the_figures_are_those_of_the_classifier(error, cause, requested, free) -> None:
    found = shortage(error)
    assert found is not None
    assert (found.cause, found.bytes_requested, found.bytes_free) == (cause, requested, free)


def test_another_error_is_none() -> None:
    assert shortage(ValueError("CUDA out of memory. Tried to allocate 2.00 GiB")) is None
    assert shortage(RuntimeError("shapes differ")) is None
