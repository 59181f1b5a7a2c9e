"""Which runs can be ranked against each other: those that were measured on the same data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from expt.config.moved import current
from expt.reports.records import RunRecord, RunSet

NODE, TARGET, PATH, UNIT = "data.", "data._target_", "data.path", "data.unit"
NOT_MEASURED_ON = (
    "batch_size", "eval_batch_size", "workers", "num_workers", "pin_memory", "device",
    "where_to_get", "expected_sensors", "adjacency_path", "input_steps",
)  # fmt: skip
"""Of the node `data`: what costs memory or time, is checked, or is shown to a model."""
LIMIT = "trainer.eval_batches"
"""Beside the node: a part of the data is other data."""
NOT_RECORDED = "not recorded"
FINGERPRINT = "fingerprint"
NONE = "None"
"""As a configuration that was flattened has it."""

Settings = tuple[tuple[str, str], ...]
"""Names and values, sorted."""


@dataclass(frozen=True)
class Group:
    """Runs that were measured on the same data, in the order of their starts."""

    name: str
    records: tuple[RunRecord, ...]


def groups_by_data(runs: RunSet) -> list[Group]:
    """Return the runs by their data, the group with the most figures first; there is at least one.

    Data are the same whose fingerprint is (`expt.job.DataSet.fingerprint`), or, of runs that were
    recorded without one, whose class, file, horizon, splits and other settings are, but for
    `NOT_MEASURED_ON`. What a search varies is compared on purpose. A run of which no data are
    recorded goes with the trials of the same search, or, without a figure, with the most.
    """
    keys = _keys(runs)
    trials = [k for k, r in zip(keys, runs.records, strict=True) if k and r.trial is not None]
    by_key: dict[Settings, list[int]] = {}
    rest = []
    for place, (key, record) in enumerate(zip(keys, runs.records, strict=True)):
        if not key and record.trial is not None and trials:
            key = trials[0]
        if key or record.value is not None:
            by_key.setdefault(key, []).append(place)
        else:
            rest.append(place)

    def size(places: list[int]) -> tuple[int, int]:
        return sum(runs.records[n].value is not None for n in places), len(places)

    sorted_keys = sorted(by_key, key=lambda key: size(by_key[key]), reverse=True)
    if not sorted_keys:
        return [Group(NOT_RECORDED, runs.records)]
    by_key[sorted_keys[0]] += rest
    names = _names([dict(key) for key in sorted_keys])
    return [
        Group(name, tuple(runs.records[n] for n in sorted(by_key[key])))
        for name, key in zip(names, sorted_keys, strict=True)
    ]


def _keys(runs: RunSet) -> list[Settings]:
    """Return what tells the data of each run apart: the settings of the first run on the same."""
    keys = [_identity(record, runs.space) for record in runs.records]
    varied = {name.lstrip("+~") for name in runs.space}
    if any(name == "data" or _is_measured_on(name) for name in varied):
        return keys  # the fingerprints differ by what is compared on purpose
    by_mark: dict[tuple[str, str], Settings] = {}
    by_settings: dict[Settings, Settings] = {}
    for place, record in enumerate(runs.records):
        if record.fingerprint is None:
            continue
        key, mark = keys[place], (record.fingerprint, record.settings.get(LIMIT, NONE))
        if mark not in by_mark:
            changed = not key or key in by_mark.values()  # the same file with other values in it
            by_mark[mark] = (*key, (FINGERPRINT, record.fingerprint)) if changed else key
        keys[place] = by_mark[mark]
        by_settings.setdefault(key, by_mark[mark])
    return [
        by_settings.get(key, key) if record.fingerprint is None else key
        for key, record in zip(keys, runs.records, strict=True)
    ]


def _is_measured_on(name: str) -> bool:
    inside = name.startswith(NODE)
    return inside and name.removeprefix(NODE).partition(".")[0] not in NOT_MEASURED_ON


def _identity(record: RunRecord, varied: Mapping[str, object]) -> Settings:
    """Return the settings that say what was measured on, nothing where no class of data is."""
    settings = record.settings
    names = {name.lstrip("+~") for name in varied}
    if TARGET not in settings or "data" in names:  # data that are varied are compared on purpose
        return ()
    found = {
        name: value
        for name, value in settings.items()
        if _is_measured_on(name) and name not in names and value != NONE
    }
    found[TARGET] = current(settings[TARGET])
    found.setdefault(UNIT, "mph")  # what a record from before the setting was in
    path = found.get(PATH, NONE)
    if path != NONE and "://" not in path and record.cwd is not None:
        found[PATH] = os.path.normpath(os.path.join(record.cwd, path))
    found[LIMIT] = settings.get(LIMIT, NONE)
    return tuple(sorted(found.items()))


def _names(groups: Sequence[Mapping[str, str]]) -> list[str]:
    """Return short names that tell groups apart: the file's or the class's, and what differs."""
    short = [_short(group) for group in groups]
    found = []
    for name, group in zip(short, groups, strict=True):
        alike = [one for one, other in zip(groups, short, strict=True) if other == name]
        differing = [
            (key, value)
            for key, value in group.items()
            if any(one.get(key) != value for one in alike) and value != NONE
        ]
        found.append(" ".join([name, *(_said(key, value) for key, value in differing)]))
    return found


def _short(group: Mapping[str, str]) -> str:
    path = group.get(PATH, NONE)
    if path != NONE:
        return PurePath(path.partition("://")[2] or path).stem
    return group.get(TARGET, NOT_RECORDED).rpartition(".")[2]


def _said(key: str, value: str) -> str:
    if key == PATH:
        return f"in {PurePath(value).parent.name or '.'}"
    return value.rpartition(".")[2] if key == TARGET else f"{key.rpartition('.')[2]}={value}"
