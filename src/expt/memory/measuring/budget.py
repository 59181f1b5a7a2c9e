"""`Budget`: how many bytes the tensors of a run may take, and a context that enforces it.

``200MiB``, ``6GiB``, ``6GB`` (10^9), ``80%`` (of the device's memory), a number of bytes, or
``auto`` (what is free now)::

    with Budget.parse("6GiB", device).enforce(device):
        train()

What is limited. On CUDA: the bytes that torch's caching allocator reserves in this process,
which are the tensors, rounded to blocks, and what the allocator holds ready. The CUDA context and
what libraries take beside the allocator (some hundred MiB) come on top. On other devices: the
bytes of tensor storages, by `expt.memory.measuring.ledger`, without scratch inside kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expt.errors import ConfigError
from expt.memory.measuring.device_memory import free_bytes, total_bytes
from expt.units import budget_problem, format_bytes, parse_bytes, parse_percent

if TYPE_CHECKING:
    import torch

    from expt.memory.measuring.budget_ledger import BudgetLedger


@dataclass(frozen=True)
class Budget:
    """A limit in bytes, and the words it was given in."""

    bytes: int
    text: str

    @classmethod
    def parse(cls, value: object, device: torch.device, name: str = "memory.budget") -> Budget:
        """Return the budget that `value` stands for on `device`.

        Args:
            value: see the top of this file.
            device: whose memory a share, ``auto`` and the upper limit refer to.
            name: what to call it in a message.

        Raises:
            ConfigError: it stands for none, or for more than the device has.

        """
        problem = budget_problem(value, name)
        if problem is not None:
            raise ConfigError(problem)
        text = str(value).strip()
        total = total_bytes(device)
        share = parse_percent(text)
        if text.lower() == "auto":
            count = free_bytes(device)
        elif share is not None:
            count = int(total * share / 100)
        else:
            count = parse_bytes(value)
        if count > total:
            raise ConfigError(
                f"{name}={text} is more than {device.type} has here: {format_bytes(total)} "
                f"({total} bytes); write at most {name}=100%"
            )
        return cls(count, text)

    def of_ranks(self, count: int, device: torch.device) -> Budget:
        """Return the budget of each of several processes.

        A card is one process's, and so is an amount; a share of the host's memory is for all.
        """
        shared = self.text.lower() == "auto" or parse_percent(self.text) is not None
        if device.type == "cuda" or not shared:
            return self
        return Budget(self.bytes // count, self.text)

    @contextmanager
    def enforce(self, device: torch.device) -> Iterator[BudgetLedger | None]:
        """Let tensors on `device` take no more than this inside; what held before holds after.

        Yields:
            the ledger that enforces it, None on CUDA, where the allocator does.

        Raises:
            torch.OutOfMemoryError: inside, from what asks for more.

        """
        if device.type == "cuda":
            with _capped(device, self.bytes):
                yield None
            return
        from expt.memory.measuring.budget_ledger import BudgetLedger

        with BudgetLedger(self.bytes) as ledger:
            yield ledger


@contextmanager
def _capped(device: torch.device, count: int) -> Iterator[None]:
    """Cap what the caching allocator may reserve at `count` bytes."""
    import torch

    if device.index is None:  # torch caps a device by its number
        device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.empty_cache()  # blocks held ready from earlier work would count
    torch.cuda.set_per_process_memory_fraction(min(count / total_bytes(device), 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
