"""What can go wrong, and which exit code it means.

::

    ExptError                 (exit 1, message only)
    ├── UserError             (exit 2, message only; also a ValueError)
    │   ├── ConfigError       a key, value or combination in the configuration
    │   ├── ModelError        a model that does not fit the data: its inputs, or what it returns
    │   └── DataError         a data file that is absent or not what it should be
    ├── RecoveryError         memory ran out and nothing was left to try
    │   └── BrokenStepError   memory ran out in the middle of an optimizer's step
    ├── LoaderError           a process that reads samples died
    ├── RankError             a process of several that train together died
    ├── SearchError           a search came to an end without a configuration to recommend
    └── StorageError          the output disk refused a write; what was saved before is intact

A bug, or a fault in a user's own model, is any other exception: exit 1 with its traceback.
An expected end of a run (stopped, diverged) is not an exception but `result.RunResult.status`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from expt.uri import without_password


class ExptError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the process's."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message without the passwords of URIs, wherever it is shown or written."""
        return without_password(super().__str__())


class UserError(ExptError, ValueError):
    """A mistake that only the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """One or more problems in the configuration, reported together."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration:\n{lines}")


class ModelError(UserError):
    """A model does not take what the data set gives, or not return what it asks for."""


class DataError(UserError):
    """A data file is absent, unreadable, or does not hold what it should."""


class LoaderError(ExptError):
    """A process that reads samples died; what was saved before is intact."""


class RecoveryError(ExptError):
    """Memory ran out, and there was nothing left to try, or trying was not wanted."""


class BrokenStepError(RecoveryError):
    """Memory ran out while the optimizer was writing: the weights are neither old nor new.

    The techniques one rung down are in force already; load a checkpoint and go on from there.
    """


class RankError(ExptError):
    """A process of several that train together failed; what was saved before is intact."""


class SearchError(ExptError):
    """A search ended without a trial inside the budget; the message says what was nearest."""


class StorageError(ExptError):
    """The output directory refused a write (full, read-only); earlier files are intact."""


MIN_PART = 4
"""Letters of a word from which on a name that contains it is a suggestion."""
MAX_NAMES = 20
"""Names that a message lists before it only counts them."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Say which known names are close to `word`: ``did you mean 'lite'?`` or the whole list."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.55)
    if not close and len(word) >= MIN_PART:
        close = [name for name in names if word.lower() in name.lower()][:count]
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not names:
        return "nothing can be set here"
    more = f", … ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    return "known names: " + ", ".join(names[:MAX_NAMES]) + more


def share_problems(name: str, value: float) -> list[str]:
    """Return that a setting is no share below 1, if so."""
    return [] if 0 <= value < 1 else [f"{name} must be in [0, 1), got {value}"]


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
