"""Memory: predict it, limit it, save it, measure it, and go on when it runs out.

What other code may call from its own training loop is offered here and imported when it is first
asked for, so that ``import expt.memory`` stays without torch.

::

    watching     readings over a run, alarms, tidying up
    planning     the peak before a run, from a step on fake tensors
    recovery     going on after memory has run out
    diagnosis    what messages, logs and readings say; no torch on import
    techniques   what makes a training take less
    measuring    bytes counted, limited, asked of a device

Imports point downwards (`tests/test_layers.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PUBLIC = {
    "Budget": "expt.memory.measuring.budget",
    "MemoryManager": "expt.memory.watching.manager",
    "OomReport": "expt.memory.diagnosis.oom",
    "classify_oom": "expt.memory.diagnosis.oom",
    "diagnose_error": "expt.memory.diagnosis.diagnosis",
    "Plan": "expt.memory.planning.predict",
    "plan": "expt.memory.planning.predict",
    "recover": "expt.memory.recovery.decorator",
}
"""Module by public name."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
