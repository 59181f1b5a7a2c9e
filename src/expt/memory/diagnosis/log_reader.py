"""Memory readings and out-of-memory messages in a file: logs of any program, our own records, CSV.

A line of a log counts when it names a step and an amount of memory: ``step 100: 18.2 GB``,
``[100/1000] mem 18.2G reserved 20.1G``, ``iter 5 ... mem_usage:cuda:0 8.9GB``,
``{'memory(GiB)': 41.1, 'step': 10}``. Words next to an amount say what it is (`amounts`). Each
device and rank is a series of its own. Tables are CSV, JSON records, or have a head in the log
(`log_tables`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from expt.memory.diagnosis.amounts import Amount, amounts
from expt.memory.diagnosis.labels import Role, describe
from expt.memory.diagnosis.log_tables import EpochSteps, TableHead, read_table, table_head
from expt.memory.diagnosis.oom import OomReport, classify_oom, probable_oom
from expt.memory.diagnosis.oom_wordings import IN_PROSE
from expt.memory.diagnosis.trend import Reading

LONGEST_LINE = 2000
"""Characters of a line that are looked at."""
MOST_READINGS_A_STEP = 16
"""Unnamed readings at one step, of as many ranks, that are told apart; of more the largest counts.
"""
LINES_OF_A_STEP = 2
"""Lines after one that names a step in which memory, called so, is that step's."""
UNITS_NOTE = {
    "MiB": "Memory without a unit is taken to be in MiB, as MMEngine and torchvision print it.",
    "bytes": "Memory without a unit is taken to be in bytes: the numbers are too large for MiB.",
}
_COUNT = r"(?P<step>\d[\d,]*)(?!\.?\d*\s*(?:[KMGT]i?B|s\b))"
_STEPS = (
    re.compile(
        r"(?<!\bs/)(?<!\bms/)(?<!\bsec/)"  # a time for each step
        r"\b(?:global[_ ]?|train(?:ing)?[_ ]?|num_)?(?:steps?|iter(?:ation)?s?|it|updates?)\b"
        rf"(?:/(?!s(?:ec(?:ond)?s?)?\b)\w+)?\s*[:=#]?\s*\[?\s*{_COUNT}",
        re.IGNORECASE,
    ),
    re.compile(r"\bafter (?P<step>\d+) (?:iterations|steps)\b"),  # Megatron
    # The last of [epoch/epochs][step/steps].
    re.compile(r"\[\s*(?P<step>\d+)\s*/\s*\d+\s*\](?!\s*\[\s*\d+\s*/)"),
    re.compile(r"\|\s*(?P<step>\d+)/(?:\d+|\?)\s*\["),  # tqdm
    re.compile(rf"\bbatch\b\s*[:=#]?\s*\[?\s*{_COUNT}", re.IGNORECASE),
)
_EPOCH = re.compile(
    r"\bepochs?\b\s*[:=#]?\s*\[?\s*(?P<step>\d+(?:\.\d+)?)(?:\s*/\s*\d+)?", re.IGNORECASE
)
_EPOCH_OF_STEP = re.compile(
    r"\bepochs?\b(?:\s*\(\w+\))?\s*[:=#]?\s*\[?\s*(\d+)"
    r"|\[\s*(\d+)\s*/\s*\d+\s*\](?=\s*\[\s*\d+\s*/)",
    re.IGNORECASE,
)
_VALIDATES = re.compile(
    r"\b(?:val(?:id(?:ation|ating)?)?|eval(?:uation|uating)?|test(?:ing)?)\b", re.I
)
"""Says that a line is not of training, and may count steps of its own."""
_ANY_STEP = re.compile(
    "|".join(one.pattern.replace("?P<step>", "?:") for one in (*_STEPS, _EPOCH)), re.IGNORECASE
)
_ABOUT_MEMORY = re.compile(
    r"\d\s?_?[KMGT]i?B?\b|\b[KMGT]i?B\b|bytes|mem|rss|ram\b|alloc|显存|内存",
    re.ASCII | re.IGNORECASE,
)
_OOM_WORD = re.compile(
    r"(?<!no )(?<!\b0 )\b(?:OOM\b|(?:CUDA )?[Oo]ut of memory)"
    r"(?![-_ ](?:event|err|er\b|safe|free|risk|retr|count|guard|score|prot))"
    r"(?!\s*[=:]\s*(?i:0(?!\.?\d)|false\b|none\b|no\b))"
)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_QUOTES = str.maketrans("", "", "'\"`")


@dataclass(frozen=True)
class LogContent:
    """What a file says about memory."""

    series: Mapping[str, tuple[Reading, ...]]  # by device; "" is one that is not named
    oom: OomReport | None
    oom_step: float | None  # where memory ran out, if the file says at which step
    ran_out: bool  # the file says that memory ran out, in whatever words
    form: str  # "log", "csv" or "json"
    notes: tuple[str, ...] = ()  # what had to be assumed
    after: str = ""  # the text below the last reading, all of it where there is none

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The readings of the first series: the fullest device, an accelerator before the host."""
        return next(iter(self.series.values()), ())


def read_log(text: str) -> LogContent:
    """Read a log, a CSV table or JSON records, whichever it is; finding nothing is no error."""
    text = _COLOUR.sub("", text)
    rows, form = read_table(text)
    if rows:
        collected = _Collected()
        for step, found in rows:
            collected.add(step, found)
        if collected.readings:
            report = classify_oom(text) or probable_oom(text)
            ran_out = report is not None
            after = _below_records(text) if form == "json" else ""
            notes = collected.notes()
            return LogContent(collected.series(), report, None, ran_out, form, notes, after)
    return _read_lines(text)


def _below_records(text: str) -> str:
    """Return what stands below the last record of JSON."""
    lines = text.splitlines()
    records = [n for n, line in enumerate(lines, 1) if line.lstrip()[:1] in tuple("[{}]")]
    return "\n".join(lines[records[-1] :]) if records else ""


def _read_lines(text: str) -> LogContent:
    by_step, by_epoch, by_row = _Collected(), _Collected(), _Collected()
    head: TableHead | None = None
    place: tuple[_Collected, float] | None = None  # the step or epoch last named
    lines_since = 0
    step: float | None = None
    ran_out_at: float | None = None
    word = False
    counted = EpochSteps()
    lines = text.splitlines()
    read = last = 0  # readings so far, and the line of the last
    for number, line in enumerate(lines, 1):
        whole = line[:LONGEST_LINE]
        line = whole.translate(_QUOTES)
        named = next((found for one in _STEPS if (found := one.search(line))), None)
        epoch = None if named else _EPOCH.search(line)
        lines_since += 1
        if named or epoch:
            place, lines_since = (by_step if named else by_epoch, _count(named or epoch)), 0
        if named:
            step = _count(named)
            of_epoch = _EPOCH_OF_STEP.search(line)
            if of_epoch is not None and place is not None:
                part = "val" if _VALIDATES.search(line) else ""
                place = (by_step, counted.on(step, int(of_epoch[1] or of_epoch[2]), part))
        if _says_oom(line, whole, first_at_a_step=named is not None and not word):
            word, ran_out_at = True, step if ran_out_at is None else ran_out_at
            continue  # its amounts are those of the message
        row = head.read(line) if head else None
        if row is not None:
            by_row.add(*row, replaces=True)
        elif _ABOUT_MEMORY.search(line) is None:
            continue
        elif place is not None and lines_since == 0:
            place[0].add(place[1], amounts(_ANY_STEP.sub(" ; ", line)))
        elif line.lstrip().startswith("{"):  # a record that names no step
            by_row.add(float(by_row.longest()), amounts(line))
        elif (new := table_head(line)) is not None:
            head = new
        elif place is not None and lines_since <= LINES_OF_A_STEP and not word:
            place[0].add(place[1], [one for one in amounts(line) if describe(one.label).memory])
        total = by_step.total + by_epoch.total + by_row.total
        if total > read:
            read, last = total, number
    report = classify_oom(text) or probable_oom(text)
    chosen = max((by_step, by_epoch, by_row), key=lambda one: one.longest())
    ran_out = word or report is not None
    return LogContent(
        chosen.series(),
        report,
        ran_out_at if ran_out else None,
        ran_out,
        "log",
        chosen.notes(),
        "\n".join(lines[last:]),
    )


def _says_oom(line: str, whole: str, first_at_a_step: bool) -> bool:
    """Tell whether a line says that memory ran out, as a message or, at a step, in a word."""
    found = _OOM_WORD.search(line)
    if found is None or IN_PROSE.search(line[: found.start()]):
        return False
    return classify_oom(whole) is not None or first_at_a_step


def _count(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found["step"].replace(",", ""))


@dataclass
class _Collected:
    """Readings by device, in the order of the file."""

    readings: dict[str, list[Reading]] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)
    total: int = 0
    """Readings taken in."""

    def add(self, step: float, found: Sequence[Amount], replaces: bool = False) -> None:
        """Take in what one line or row says; `replaces` what the one before said of its step."""
        for name, reading in _readings(step, found).items():
            known = self.readings.setdefault(name, [])
            if replaces and known and known[-1].step == step:
                known.pop()
            known.append(reading)
            self.total += 1
            self.assumed |= {one.assumed_unit for one in found if one.assumed_unit}

    def longest(self) -> int:
        """Return the number of readings of the longest series."""
        return max(map(len, self.readings.values()), default=0)

    def notes(self) -> tuple[str, ...]:
        """Return what was assumed about units."""
        return tuple(UNITS_NOTE[unit] for unit in sorted(self.assumed))

    def series(self) -> dict[str, tuple[Reading, ...]]:
        """Return the series by name, the fullest accelerator first and the host last."""
        found = {
            (f"{name} ({place})" if name else place) if place else name: readings
            for name, known in self.readings.items()
            for place, readings in _told_apart(known).items()
        }

        if "#2" in found and "" in found:
            found["#1"] = found.pop("")

        def order(item: tuple[str, tuple[Reading, ...]]) -> tuple[bool, int]:
            return "CPU" in item[0], -max(one.allocated_bytes for one in item[1])

        return dict(sorted(found.items(), key=order))


def _readings(step: float, found: Iterable[Amount]) -> dict[str, Reading]:
    """Return the readings of one line by device.

    A second amount of the same kind on the same device is a series of its own, by its label or, if
    that is the same, by its place.
    """
    named: dict[str, dict[Role, Amount]] = {}
    for one in found:
        name = one.device
        before = named.get(name, {}).get(one.role)
        if before is not None and before.label != one.label:
            name = f"{name} {one.label}".strip()
        base, number = name, 2
        while one.role in named.get(name, {}):
            name, number = f"{base} #{number}".strip(), number + 1
        named.setdefault(name, {})[one.role] = one
    readings = {}
    for name, amounts_of in named.items():
        of_device = {role: one.count_bytes for role, one in amounts_of.items()}
        if of_device.keys() & {"allocated_bytes", "peak_bytes"}:
            readings[name] = _reading(step, of_device)
        elif of_device.keys() & {"reserved_bytes", "peak_reserved_bytes"}:
            reserved = of_device.get("reserved_bytes")
            peak = reserved is None
            count = of_device["peak_reserved_bytes"] if reserved is None else reserved
            readings[f"{name} reserved".strip()] = Reading(step, count, high_water=peak)
    return readings


def _reading(step: float, values: Mapping[Role, int]) -> Reading:
    allocated, peak = values.get("allocated_bytes"), values.get("peak_bytes")
    high_water = allocated is None
    return Reading(
        step,
        values["peak_bytes"] if allocated is None else allocated,
        values.get("reserved_bytes", values.get("peak_reserved_bytes") if high_water else None),
        values.get("other_bytes"),
        peak if allocated is not None else None,
        values.get("total_bytes"),
        high_water=high_water,
    )


def _told_apart(readings: Sequence[Reading]) -> dict[str, tuple[Reading, ...]]:
    """Count on where steps begin again, and tell unnamed ranks apart by their size.

    Where nearly every step has as many readings, they are of so many ranks that do not say which
    they are: the largest of every step is one series, the second largest another. Else the largest
    of a step counts.
    """
    offset = previous = highest = 0.0
    by_step: dict[float, list[Reading]] = {}
    for reading in readings:
        if reading.step < previous / 2:  # a new epoch or a resumed run, not a rank behind
            offset = highest
        previous = reading.step
        at = reading.step + offset
        highest = max(highest, at)
        by_step.setdefault(at, []).append(replace(reading, step=at))
    steps = [
        sorted(by_step[at], key=lambda one: one.allocated_bytes, reverse=True)
        for at in sorted(by_step)
    ]
    ((count, how_often),) = Counter(map(len, steps)).most_common(1)
    if how_often < 4 or how_often < 0.8 * len(steps) or count > MOST_READINGS_A_STEP:
        count = 1
    return {
        "" if count == 1 else f"series {place + 1} of {count} by size": tuple(
            at_step[place] for at_step in steps if len(at_step) > place
        )
        for place in range(count)
    }
