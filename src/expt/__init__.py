"""expt: Hydra experiments that fit the GPU they run on.

From Python, and in a notebook::

    import expt

    result = expt.train(["+memory=lite", "trainer.epochs=2"])
    model, transforms = expt.load(result.run_dir)

What a command line may say, `train`, `grid`, `sweep` and `plan_run` take as a list. They are
imported when they are first used, so that ``import expt`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_OFFERED = {
    "load": "expt.run.saved",
    **dict.fromkeys(("train", "grid", "sweep", "plan_run"), "expt.commands.from_python"),
}
"""What is offered here, and the module it is in."""


def __getattr__(name: str) -> Any:
    if name in _OFFERED:
        return getattr(import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'expt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFERED])
