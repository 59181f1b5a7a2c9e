"""Amounts of memory in a line or a table's cell: how many bytes, of what, on which device.

A number is an amount of memory if a byte unit follows it (``18.2 GB``) or is part of its name
(``memory_gb``), or if its name is one of memory and its unit a bare ``M`` or ``G``, or, by the
convention of MMEngine and torchvision, none (``memory: 4672`` are MiB). The words next to it must
not name anything else: files, tokens, parameters, rates and the like are never memory, and neither
is a number with words next to it of which none is about memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from expt.memory.diagnosis.labels import Label, Role, describe, marked, name_label
from expt.units import WRITTEN_NUMBER, WRITTEN_UNIT, written_bytes

MOST_PLAUSIBLE = 16 * 1024**4
"""Bytes above which a number is no memory of one machine."""
UNITLESS_MIB = (100, 1024**2)
"""Numbers without a unit that are taken as MiB: below are percentages, above is more than 1 TiB."""
UNITLESS_BYTES = 2**24
"""Numbers without a unit from which on they are taken as bytes."""

_SEPARATOR = re.compile(
    r"(?<!\d),|,(?!\d{3}(?!\d))|[;|\t{}()\[\]]|(?<![:=\s])\s{2,}|\s[-*\u2013\u2014]\s"
)
_TOKEN = re.compile(
    rf"(?<![\w.\x00+-])(?P<number>{WRITTEN_NUMBER})(?:\s?_?(?P<unit>{WRITTEN_UNIT})(?![\w%]))?"
    r"(?P<rate>\s*(?:/|per\b)\s*(?:s|ms|min|h|it|sec\w*|hour|iter\w*|step|epoch|sample|token)\b)?"
)
_OF = re.compile(r"\s*(?:used )?(?:/|of|out of)\s*")
_LIST = re.compile(r"(?P<name>[\w./ -]+[=:]\s*)\[(?P<values>[\w., ]+)\]")


@dataclass(frozen=True)
class Amount:
    """Bytes of one kind on one device; the device is "" where nothing names it."""

    count_bytes: int
    role: Role
    device: str
    label: str  # the words that name it
    assumed_unit: str = ""  # "MiB" or "bytes" where the text gives none


@dataclass(frozen=True)
class _Token:
    """A number in a text, with its unit, and with the total of ``18.2/24 GB``."""

    number: str
    unit: str
    start: int
    end: int
    is_rate: bool
    total: str = ""


def amounts(line: str) -> list[Amount]:
    """Return every amount of memory in a line; steps and times of day should be cut out before."""
    line = marked(_LIST.sub(_each_named, line))
    context = Label("")
    device = rank = ""
    named: list[Amount] = []
    unnamed: list[Amount] = []
    for part in _SEPARATOR.split(line):
        labelled = list(_labelled(part))
        if not labelled:
            alone = describe(part)
            device, rank = alone.device or device, alone.rank or rank
            context = context if alone.empty and not alone.device else alone
        for token, label in labelled:
            rank = label.rank or rank
            if token.unit or label.unit or label.memory or label.role_word:
                found = _found(token, label, context, (rank, label.device or device))
                says_what = not label.empty or label.device or context.memory
                (named if says_what else unnamed).extend(found)
                device = label.device or device
            if label.foreign or (label.unknown and not label.memory):
                context = Label("")
    known = any(one.role in ("allocated_bytes", "peak_bytes") for one in named)
    return named if known else named + unnamed


def _each_named(found: re.Match[str]) -> str:
    """Write ``mem_gb=[8.3, 8.4]`` as ``mem_gb=8.3 ; mem_gb=8.4``: one for each rank."""
    return " ; ".join(found["name"] + value for value in found["values"].split(","))


def cell_amounts(name: str, value: str, device: str = "") -> list[Amount]:
    """Return the amount in a table's cell or a record's field, with its total if it gives one.

    Args:
        name: of the column or field.
        value: as written, with or without a unit.
        device: what the row is about, if it says so.

    """
    label = name_label(name)
    if not label.about_memory:
        return []
    tokens = _tokens(value)
    if len(tokens) != 1 or tokens[0].start or re.search(r"[^\W_]|%", value[tokens[0].end :]):
        return []
    where = (label.rank, label.device)
    if device:
        where = (device, "" if label.device in device else label.device)
    return _found(tokens[0], label, Label(""), where)


def _labelled(part: str) -> Iterator[tuple[_Token, Label]]:
    """Yield the numbers of a part of a line, each with the words that belong to it."""
    tokens = _tokens(part)
    if not tokens:
        return
    ends = [0, *(token.end for token in tokens)]
    starts = [*(token.start for token in tokens), len(part)]
    gaps = [describe(part[end:start]) for end, start in zip(ends, starts, strict=True)]
    first, last = gaps[0], gaps[-1]
    words_follow = first.empty and (not last.empty or bool(last.device and not first.device))
    for at, token in enumerate(tokens):
        label = gaps[at + words_follow]
        if words_follow and (first.device or first.rank):
            label = replace(
                label, device=label.device or first.device, rank=label.rank or first.rank
            )
        if not words_follow and token is tokens[-1] and not (last.empty and not last.device):
            # ``used 12.0M tokens``, ``used 8.3 GB GPU``
            foreign = label.foreign or last.foreign or (not label.memory and last.unknown)
            foreign = foreign or not (token.unit or label.unit)  # ``memory: 3 entries``
            label = replace(label, foreign=foreign, device=label.device or last.device)
        yield token, label


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for found in _TOKEN.finditer(text):
        start, end = found.span()
        after = text[end : end + 1]
        unclear = bool(found["rate"]) or (
            found["unit"] is None and (after.isalpha() or after == "%")
        )
        token = _Token(found["number"], found["unit"] or "", start, end, unclear)
        before = tokens[-1] if tokens else None
        if before and not before.total and _OF.fullmatch(text, before.end, start):
            # 18.2/24 GB, 18.2 GB of 24 GB
            unit = before.unit or token.unit
            tokens[-1] = _Token(
                before.number, unit, before.start, end, unclear, f"{token.number} {token.unit}"
            )
            continue
        tokens.append(token)
    return tokens


def _found(token: _Token, label: Label, context: Label, where: tuple[str, str]) -> list[Amount]:
    """Return the amount that a number is with these words, and its total; nothing if it is none."""
    if token.is_rate or label.foreign or (label.empty and context.foreign):
        return []
    if not (label.about_memory or (label.empty and not label.unknown)):
        return []
    unit, assumed = _unit(token, label, context)
    if unit is None:
        return []
    device = " ".join(part for part in where if part)
    role = context.role if label.empty and context.memory else label.role
    second: Role = "total_bytes"
    if token.total and "/" in label.text:  # ``allocated/reserved: 8.3/20.1 GB``
        first, _, after = label.text.rpartition("/")
        role, named = describe(first).role, describe(after).role
        second = named if named != role else second
    own = Amount(written_bytes(token.number, unit), role, device, label.text, assumed)
    found = [own]
    if token.total:
        number, total_unit = token.total.split(" ")
        count = written_bytes(number, total_unit or unit)
        found.append(Amount(count, second, device, label.text, assumed))
    return found if own.count_bytes <= MOST_PLAUSIBLE else []


def _unit(token: _Token, label: Label, context: Label) -> tuple[str | None, str]:
    """Return the unit of a number, None if it cannot be memory, and the unit if it is assumed."""
    unit = token.unit
    if "util" in label.text.lower() and len(unit) < 2 and not label.unit:
        return None, ""  # a share, unless bytes are said
    if len(unit) == 1:
        if unit == "B":
            clear = label.memory and token.number.isdigit()
        else:
            in_use = "use" in label.text.lower() or bool(describe(label.text).device)
            clear = label.memory or context.memory or (unit == "G" and in_use)
        return (unit if clear else None), ""
    if unit:
        is_bits = unit[0].isupper() and unit.endswith("b") and not unit[1:].startswith("i")
        return (None if is_bits and not label.memory else unit), ""
    if label.unit:
        return label.unit, ""
    if context.memory and context.unit and not label.empty:
        return context.unit, ""
    return _assumed_unit(token, label)


def _assumed_unit(token: _Token, label: Label) -> tuple[str | None, str]:
    """Return the unit of ``memory: 4672`` by convention."""
    text = label.text.lower()
    of_memory = label.memory and re.search("mem|ram|rss|显存|内存", text) is not None
    if not of_memory or label.unknown:
        return None, ""
    number = float(token.number.replace(",", ""))
    if UNITLESS_MIB[0] <= number <= UNITLESS_MIB[1]:
        return "MiB", "MiB"
    if number >= UNITLESS_BYTES and number.is_integer():
        return "bytes", "bytes"
    return None, ""
