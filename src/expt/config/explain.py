"""What was wrong with a command line, all of it, with the nearest valid names.

When Hydra refuses a command line it stops at the first problem and names neither the others nor
what would have been right. `explain` goes through the arguments one by one, leaves out what is
wrong, and judges the rest like a run would.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import config_dir, key, open_composition, overrides, quoted
from expt.config.schema import OPEN_GROUPS
from expt.config.settings import locate, parameters_of
from expt.config.validate import validated
from expt.errors import ConfigError, nearest

REFUSALS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return one message with every problem among the arguments."""
    own = config_dir(arguments)
    open_composition(own)
    try:
        problems = _problems(overrides(arguments))
        if own is not None and not Path(own).is_dir():
            problems.insert(0, f"--config-dir={own}: there is no such folder")
    finally:
        GlobalHydra.instance().clear()
    return str(ConfigError(problems or [first_lines(error)]))


def first_lines(error: Exception) -> str:
    """Return what an exception says, without Hydra's pointers into its internals."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if lines and lines[0].startswith("Ambiguous value"):
        said = "several values: to try each in turn, add -m; for one list, write key=[a,b]"
        line = re.sub("^Ambiguous value for argument '(.*)'$", r"\1", lines[0])
        is_path = re.search(r"[/\\]|\.[a-z]", line.partition("=")[2]) is not None
        return f"{said}; for a name with commas, {_quoted_twice(line)}" if is_path else said
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "See "))]
    return " ".join(kept[:2]).replace(" reference_type=", " in ")


def _problems(lines: list[str]) -> list[str]:
    parsed, problems = [], []
    for place, line in enumerate(lines):
        try:
            parsed.append(OverridesParser.create().parse_override(line))
        except HydraException as error:
            hint = _unreadable_hint(lines, place)
            problems.append(f"{line!r} cannot be read ({first_lines(error)}){hint}")
    groups = {name for name in _loader().list_groups("") if not name.startswith("hydra")}
    chosen, values = [], []
    for override in parsed:
        if override.key_or_group not in groups:
            values.append(override)
        elif found := _unknown_options(override):
            problems += found
        else:
            # A sweep over a group has no single composition; its first option stands for all.
            chosen.append(re.sub(r"=([^,\[]+),.*$", r"=\1", override.input_line or ""))
    # A class of the user's own decides which other keys there may be.
    targets = [o for o in values if o.key_or_group.endswith("._target_")]
    chosen += [o.input_line or "" for o in targets if not o.is_sweep_override()]
    try:
        base = compose("config", overrides=chosen)
    except REFUSALS as error:
        return [*problems, first_lines(error)]
    sound = list(chosen)
    for override in values:
        if key(override.input_line or "").split(".")[0] == "hydra":
            continue
        found = _value_problems(override, base, chosen, groups)
        problems += found
        if not found and not override.is_sweep_override():
            sound.append(override.input_line or "")
    return problems + _problems_of_the_rest(sound)


def _unreadable_hint(lines: list[str], place: int) -> str:
    """Say what to write in place of an argument that Hydra's grammar does not have."""
    line = lines[place]
    name, equals, value = line.partition("=")
    if equals:
        is_path = "/" in value or name.endswith(("path", "dir", "log"))
        is_structure = re.match(r"""[\[{"']|\w+\(""", value) is not None
        if not value or (is_structure and not is_path):
            return ""
        return f"; where a text has more than letters, digits and -_./ in it, {_quoted_twice(line)}"
    hint = "; settings look like key=value or group=option"
    first = next((n for n in range(place, -1, -1) if "=" in lines[n]), place)
    whole = " ".join(lines[first : place + 1])
    if first < place and re.search(r"[/.\\]", whole.partition("=")[2]):
        hint += f"; if it is part of a name with spaces, {_quoted_twice(whole)}"
    return hint


def _quoted_twice(line: str) -> str:
    """Return how to type a setting whose value is one text, for a shell and for Hydra."""
    name, _, value = line.partition("=")
    return f"quote it twice: {shlex.quote(f'{name}={quoted(value)}')}"


def _unknown_options(override: Override) -> list[str]:
    name = override.key_or_group
    options = _loader().get_group_options(name)
    wrong = [word for word in _words(override) if word not in options]
    return [f"{name}={word}: no such option; {nearest(word, options)}" for word in wrong]


def _value_problems(
    override: Override, base: DictConfig, chosen: list[str], groups: set[str]
) -> list[str]:
    """Try one value, or each of a sweep's, on top of the groups alone."""
    line = override.input_line or ""
    lines = [line]
    if override.is_sweep_override():
        prefix = line.partition("=")[0]
        lines = [f"{prefix}={word}" for word in _words(override)]
    problems = []
    for single in lines:
        try:
            compose("config", overrides=[*chosen, single])
        except REFUSALS as error:
            known = _unknown_key(base, key(single), groups)
            problems.append(f"{single}: {known or first_lines(error)}".replace("\n", " "))
    return problems


def _problems_of_the_rest(sound: list[str]) -> list[str]:
    """Judge what remains like a run would, so that its problems come in the same message."""
    try:
        validated(compose("config", overrides=sound), {key(line) for line in sound})
    except ConfigError as error:
        return error.problems
    except REFUSALS as error:
        return [first_lines(error)]
    return []


def _unknown_key(cfg: DictConfig, dotted: str, groups: set[str]) -> str | None:
    """Say which part of a dotted key is not there, or None if all of it is."""
    node: Any = cfg
    walked: list[str] = []
    for part in dotted.split("."):
        names = {str(name) for name in node} if isinstance(node, DictConfig) else set()
        if part not in names:
            if len(walked) == 1 and part in _accepted(cfg, walked[0]):
                return (
                    f"it is not set in the YAML file; to add it, write +{dotted}=VALUE, or begin "
                    "the file with another's settings, `defaults: [NAME, _self_]`"
                )
            known = names | groups if not walked else names | _accepted(cfg, walked[0])
            where = f" in {'.'.join(walked)}" if walked else ""
            return f"there is no {part!r}{where}; {nearest(part, known)}"
        walked.append(part)
        node = OmegaConf.select(cfg, ".".join(walked), throw_on_missing=False)
    return None


def _accepted(cfg: DictConfig, group: str) -> set[str]:
    """Return the arguments that an open group's class takes; empty for every other group."""
    if group not in OPEN_GROUPS:
        return set()
    try:
        return set(parameters_of(locate(cfg[group]._target_))) - {"params"}
    except (ConfigError, ImportError, *REFUSALS):
        return set()


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _words(override: Override) -> list[str]:
    """Return the values an override names: one, several of a sweep, or a list."""
    if override.is_sweep_override():
        return [str(word) for word in override.sweep_string_iterator()]
    value = override.value()
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]
