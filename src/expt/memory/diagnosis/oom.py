"""Tell whether an error is a lack of memory, and whose.

`classify_oom` knows how the allocators and libraries under torch and other frameworks say that
memory ran out (`oom_wordings`), and is not fooled by sentences that merely contain the words.
`probable_oom` knows how a process ends that the system killed, which has other reasons as well.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from expt.memory.diagnosis.oom_figures import Cause, Figures, likely_cause, read_figures
from expt.memory.diagnosis.oom_wordings import (
    DEVICE_NAMES,
    HINT,
    HOST_KINDS,
    IN_PROSE,
    KILLED,
    KILLED_FOR_OTHERS,
    PATTERNS,
    Kind,
)


@dataclass(frozen=True)
class OomReport:
    """One failure to allocate; figures that the message does not give are None.

    `figures.reserved_bytes` is all the caching allocator holds, allocated included.
    """

    kind: Kind
    cause: Cause
    figures: Figures
    evidence: str  # the line that says so

    @property
    def bytes_requested(self) -> int | None:
        """What was asked for."""
        return self.figures.requested_bytes

    @property
    def bytes_free(self) -> int | None:
        """What the device had left."""
        return self.figures.free_bytes

    @property
    def bytes_total(self) -> int | None:
        """The device's capacity."""
        return self.figures.total_bytes

    @property
    def bytes_allocated(self) -> int | None:
        """What this process's tensors took."""
        return self.figures.allocated_bytes

    @property
    def bytes_reserved(self) -> int | None:
        """What torch's caching allocator held, allocated included."""
        return self.figures.reserved_bytes


def classify_oom(error: BaseException | str) -> OomReport | None:
    """Return what ran out of memory, or None if this is some other problem.

    Args:
        error: an exception, whose causes, contexts and groups are searched too, or any text:
            a message, a traceback, a whole log. In a text the first report counts.

    """
    if isinstance(error, str):
        return _classify_text(error)
    for one in chain(error):
        report = _classify_exception(one)
        if report is not None:
            return report
    return None


def probable_oom(text: str) -> OomReport | None:
    """Return a report on a process that was killed, probably for memory; None if nothing was.

    Whoever reads an exception to recover from it should not guess: `classify_oom` does not.
    """
    found = KILLED.search(text)
    if found is None or KILLED_FOR_OTHERS.search(text):
        return None
    start = text.rfind("\n", 0, found.end() - 1) + 1
    end = text.find("\n", found.end())
    line = text[start : end if end >= 0 else len(text)].strip()
    return OomReport("killed", "unknown", Figures(), " ".join(line.split())[:400])


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception, those in its group, and those it came from, each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        elif one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)


def _classify_exception(error: BaseException) -> OomReport | None:
    text = str(error)
    report = _classify_text(text)
    # A MemoryError may be of a device, as RAPIDS raises it; of the host, its type says enough.
    if report and (report.kind not in HOST_KINDS or not isinstance(error, MemoryError)):
        return report
    names = {base.__name__ for base in type(error).__mro__}
    kind: Kind
    if isinstance(error, MemoryError):
        kind = "memory_error"
    elif "OutOfMemoryError" in names:  # torch's, without importing torch
        kind = "device"
    elif isinstance(error, OSError) and error.errno == errno.ENOMEM:
        kind = "host_allocator"
    else:
        return None
    return _report(kind, text, f"{type(error).__name__}: {text}".rstrip(": "))


def _classify_text(text: str) -> OomReport | None:
    if len(text) > _MESSAGE_LENGTH:
        text = _near_hints(text)
    for kind, pattern in PATTERNS:
        for found in pattern.finditer(text):
            line_start = text.rfind("\n", 0, found.start()) + 1
            says_figures = "allocate" in found[0]
            if not says_figures and IN_PROSE.search(text[line_start : found.start() + 1]):
                continue
            name = (found.groupdict().get("name") or "").strip()
            message = text[line_start : _end(text, pattern, found)]
            line_end = text.find("\n", found.end())
            line = text[line_start : line_end if line_end >= 0 else len(text)].strip()
            shortened = found[0].startswith("Tried") and re.search("GPU|PyTorch", message)
            named = DEVICE_NAMES.get(name, "cuda" if shortened else "device")
            return _report(kind or named, message, line)
    return None


_MESSAGE_LENGTH = 1500
"""Characters after its first words in which a message gives its figures."""


def _end(text: str, pattern: re.Pattern[str], found: re.Match[str]) -> int:
    """Return where a message ends: where another of its wording begins, of another rank say."""
    end = found.end() + _MESSAGE_LENGTH
    following = pattern.search(text, found.end(), end)
    return end if following is None else following.start()


def _near_hints(text: str) -> str:
    """Return the parts of a long text in which a report could be, so that a log is read fast."""
    parts: list[str] = []
    end = 0
    for hint in HINT.finditer(text):
        start = max(text.rfind("\n", 0, max(hint.start() - 200, 0)) + 1, hint.start() - 1000, end)
        if hint.end() > end:
            end = hint.end() + _MESSAGE_LENGTH
            parts.append(text[start:end])
    return "".join(parts)


def _report(kind: Kind, message: str, evidence: str) -> OomReport:
    figures = read_figures(message)
    return OomReport(kind, likely_cause(figures), figures, " ".join(evidence.split())[:400])
