"""Figures of a run that is over: one that cannot be drawn is a note, and the others are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from expt.errors import ExptError, first_line


def drawn(*draws: Callable[[], Path | Iterable[Path] | None]) -> list[Path]:
    """Return the files of the figures that these draw, without those of one that fails.

    Raises:
        ExptError: the disk refused a write, or memory ran out for good.

    """
    paths: list[Path] = []
    for draw in draws:
        try:
            made = draw()
            paths += [made] if isinstance(made, Path) else made or ()
        except ExptError:
            raise
        except Exception as error:
            print(f"note: a plot of this run cannot be drawn ({first_line(error)})")
    return paths
