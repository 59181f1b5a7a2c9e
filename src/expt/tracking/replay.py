"""Sends what earlier processes recorded and could not deliver.

    report = replay(Path("outputs"))

A directory whose process still runs is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expt.tracking.journal import JOURNAL, STATE, State, read_header
from expt.tracking.sender import NotReadyError, Sender, Target
from expt.tracking.store import reason
from expt.uri import PasswordMissingError, sqlite_path, without_password


@dataclass(frozen=True)
class Replayed:
    """What became of one directory; `left` lines (None: unknown) are not sent, and why.

    Artifacts that are gone count as left, once: another replay has nothing to send of them.
    """

    directory: Path
    sent: int
    left: int | None
    reason: str | None = None


@dataclass(frozen=True)
class ReplayReport:
    """One entry per directory that had something to send, or could not be looked into."""

    directories: tuple[Replayed, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is left anywhere, except what running processes send themselves."""
        return all(entry.left == 0 for entry in self.directories)


def replay(root: Path) -> ReplayReport:
    """Send every journal under `root` that has lines its store did not acknowledge.

    A database that any of them was sent to is not made anew: it may be on a disk that is not there.
    """
    directories = _parents_first(root)
    silent = _gone(directories, root)
    entries = (_send(directory, silent) for directory in directories)
    return ReplayReport(tuple(entry for entry in entries if entry is not None))


def _gone(directories: list[Path], root: Path) -> dict[str, str]:
    """Return the databases that runs were sent to and that are not there, and what to do."""
    gone = {}
    for directory in directories:
        header, state = read_header(directory), State.load(directory)
        if header is None or state is None or state.run_id is None:
            continue
        uri = Target.kept(directory, header, state).uri
        database = sqlite_path(uri)
        if database is not None and not database.exists():
            gone[uri] = (
                f"there is no file {database}; put it back, or remove the files {STATE} under "
                f"{root} and all runs are sent anew, to where they were begun"
            )
    return gone


def _parents_first(root: Path) -> list[Path]:
    ordered: dict[Path, None] = {}

    def visit(directory: Path, below: tuple[Path, ...]) -> None:
        header = read_header(directory)
        if header is None or directory in ordered or directory in below:
            return
        if header.get("parent"):
            visit((directory / header["parent"]).resolve(), (*below, directory))
        ordered[directory] = None

    for journal in sorted(root.resolve().rglob(JOURNAL)):
        visit(journal.parent, ())
    return list(ordered)


def _send(directory: Path, silent: dict[str, str]) -> Replayed | None:
    """Send one journal; `silent` holds the stores that do not answer, each asked once, and why."""
    sender = Sender(directory)
    try:
        outstanding = left = sender.outstanding()
        if not outstanding:
            return None
        assert sender.state is not None
        uri = sender.state.uri
        if uri in silent:
            return Replayed(directory, 0, outstanding, silent[uri])
        try:
            while sender.send_group():
                pass
            without = list(sender.without)
            why = f"gone or not to be stored: {', '.join(without)}" if without else None
            return Replayed(directory, outstanding - len(without), len(without), why)
        except (NotReadyError, PasswordMissingError) as error:
            left = sender.outstanding()
            return Replayed(directory, outstanding - left, left, str(error))
        except Exception as error:
            answers = sender.answers()
            does = "does not take it" if answers else "does not answer"
            why = f"{without_password(uri)} {does} ({reason(error)})"
            if not answers:
                silent[uri] = why
            left = sender.outstanding()
            return Replayed(directory, outstanding - left, left, why)
    except NotReadyError as error:
        return Replayed(directory, 0, 0, str(error))
    except OSError as error:
        return Replayed(directory, 0, None, str(error))
    finally:
        sender.close()
