"""Memory: predict it, limit it, save it, measure it, and go on when it runs out.

What other code may call from its own training loop is offered here and imported when it is first
asked for, so that ``import expt.memory`` stays without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PUBLIC = {
    "Budget": "expt.memory.budget",
    "MemoryManager": "expt.memory.manager",
    "OomReport": "expt.memory.oom",
    "classify_oom": "expt.memory.oom",
    "Plan": "expt.memory.planning",
    "plan": "expt.memory.planning",
    "recover": "expt.memory.recovered_step",
}
"""Module by public name."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
