"""What of the program and the machine a plan may depend on, as this process runs it.

A process runs the code that it imported, whatever its files have become since. Each file is
therefore hashed when it is first seen, and that is kept; once one is not as it was then, this
process can no longer say what it runs (`ChangedCodeError`), and predictions are neither kept nor
found again by it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import expt

PACKAGE = Path(expt.__file__).parent


class ChangedCodeError(Exception):
    """A file of the program is not what it was when this process first saw it."""


class Code:
    """Files of code, each as it was when it was first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[int, int] | None, bytes]] = {}
        self._changed = False

    def hash_of(self, paths: Iterable[str]) -> str:
        """Return a hash of files, by their names and what is in them.

        Raises:
            ChangedCodeError: one of them has changed.

        """
        whole = hashlib.sha256()
        for path in sorted(paths):
            if path not in self._seen:
                state = _state(path)
                content = Path(path).read_bytes() if state is not None else b""
                self._seen[path] = (state, hashlib.sha256(content).digest())
            whole.update(path.encode() + self._seen[path][1])
        self.check()
        return whole.hexdigest()

    def check(self) -> None:
        """Make sure that all files that were ever seen are as they were.

        Raises:
            ChangedCodeError: one is not, or was not at an earlier look.

        """
        if not self._changed:
            self._changed = any(_state(path) != was for path, (was, _) in self._seen.items())
        if self._changed:
            raise ChangedCodeError("a file of the program has changed since it was imported")


code = Code()


def check_code() -> None:
    """Make sure that this process still runs what its files say.

    Raises:
        ChangedCodeError: it does not.

    """
    code.check()


def _state(path: str) -> tuple[int, int] | None:
    """Return the size and the time of a file's last change, None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def program() -> list[Any]:
    """Return what of the program and the machine any plan may depend on.

    Raises:
        ChangedCodeError: the program's files are not what this process runs.

    """
    return [
        code.hash_of(_own_files()), code.hash_of(_users_files()), installed(), torch.__version__,
        platform.node(), platform.machine(), torch.get_num_threads(),
        os.environ.get("OMP_NUM_THREADS"),
    ]  # fmt: skip


@lru_cache(maxsize=1)
def installed() -> str:
    """Return a hash of the names and versions of all installed packages."""
    names = sorted(f"{one.metadata['Name']}=={one.version}" for one in distributions())
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@lru_cache(maxsize=1)
def _own_files() -> tuple[str, ...]:
    return tuple(str(path) for path in PACKAGE.rglob("*.py"))


def _users_files() -> list[str]:
    """Return the files of loaded modules that are neither installed nor of this package."""
    elsewhere = {*site.getsitepackages(), sysconfig.get_path("stdlib"), str(PACKAGE)}
    loaded = {str(getattr(module, "__file__", None)) for module in [*sys.modules.values()]}
    return [
        path
        for path in loaded
        if path.endswith(".py") and not any(path.startswith(f"{f}{os.sep}") for f in elsewhere)
    ]


def hash_of_classes(kinds: Iterable[type]) -> str:
    """Return a hash of the files that classes and their bases come from, installed ones too.

    Those of torch and of Python are told by their versions.

    Raises:
        ChangedCodeError: one of them has changed.
        LookupError: a class comes from no file.

    """
    names = {base.__module__ for kind in kinds for base in kind.__mro__}
    paths = set()
    for name in names:
        root = name.partition(".")[0]
        if root == "torch" or (root in sys.stdlib_module_names and root != "__main__"):
            continue
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None:
            raise LookupError(f"the module {name} has no file")
        paths.add(path)
    return code.hash_of(paths)
