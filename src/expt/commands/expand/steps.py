"""Whether the steps of an expansion can be tried at all, judged before anything is run."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.config.compose import CONFIG_NAME, key
from expt.config.schema import COMMAND_NODES
from expt.config.validate import validated
from expt.errors import ConfigError, nearest

NO_STEPS = (
    *sorted(COMMAND_NODES), "task", "search", "tracking", "hydra", "trainer.resume",
    "trainer.monitor",
)  # fmt: skip
"""Keys, and beginnings of keys, that are not part of what is trained, or say how it is judged."""
CHOICES = ("model", "optimizer")
"""Groups whose choice is one thing, and may be a step."""
ONLY_CHOSEN = ("experiment", "debug", "local")
"""Groups without a node of their own."""
BUDGET, PRESET = "memory.budget", "memory"


def without_settings(base: Sequence[str], steps: Sequence[str]) -> dict[str, str]:
    """Return the steps whose setting the starting point does not have, and what is missing.

    Args:
        base: the settings of the starting point.
        steps: the changes.

    """
    plain = compose(CONFIG_NAME, overrides=list(base))
    missing = {step: _unknown(plain, key(step)) for step in steps if not step.startswith("+")}
    return {step: words for step, words in missing.items() if words is not None}


def without_effect(base: Sequence[str], steps: Sequence[str]) -> list[str]:
    """Return the steps that leave the starting point as it is, but for those that go back to it.

    Args:
        base: the settings of the starting point.
        steps: the changes, in order.

    """
    plain = _resolved(base)
    earlier: set[str] = set()
    found = []
    for step in steps:
        if key(step) not in earlier and plain is not None and _resolved([*base, step]) == plain:
            found.append(step)
        earlier.add(key(step))
    return found


def _resolved(lines: Sequence[str]) -> Any:
    """Return the whole configuration as plain values, None where it cannot be composed."""
    try:
        return OmegaConf.to_container(compose(CONFIG_NAME, overrides=list(lines)), resolve=True)
    except (HydraException, OmegaConfBaseException):
        return None


def step_problems(base: Sequence[str], steps: Sequence[str], forced: Sequence[str]) -> list[str]:
    """Return one message per step that cannot be: unknown keys, values that are refused.

    Args:
        base: the settings of the starting point.
        steps: the changes, in order.
        forced: the settings that every probe is given on top, whatever a step says.

    """
    if not steps:
        return [
            "expand.steps is empty; give the changes to try in order, in quotes, like "
            """'expand.steps=["model.num_stages=3","data.batch_size=24"]'"""
        ]
    found = []
    plain = compose(CONFIG_NAME, overrides=list(base))
    given = {key(line) for line in forced}
    for number, step in enumerate(steps):
        problem = _forbidden(step, given) or _problem(plain, base, steps[:number], step)
        if problem is not None:
            found.append(f"expand.steps: {step}: {problem}")
    return found


def _forbidden(step: str, forced: Set[str]) -> str | None:
    """Say why a step of this key would change nothing, or not what is trained."""
    name = key(step)
    if among(name, NO_STEPS):
        return f"{name} is not part of what is trained, so it is no step"
    if name == PRESET:
        return (
            "a preset is many settings at once; give it as the starting point "
            f"(+{step.lstrip('+')}), and single settings as steps"
        )
    if name == BUDGET:
        return f"{name} is the same for all steps; give it on the command line, beside expand.steps"
    if name in forced:
        return f"{name} is the same for every probe, so that this step would change nothing"
    return None


def _problem(
    plain: DictConfig, base: Sequence[str], before: Sequence[str], step: str
) -> str | None:
    if "=" not in step:
        return "a step is one setting, like model.num_stages=3"
    several = _several(plain, step)
    if several is not None:
        return several
    try:
        cfg = compose(CONFIG_NAME, overrides=[*base, step])
    except (HydraException, OmegaConfBaseException) as error:
        return _unknown(plain, key(step)) or _first_line(error)
    try:
        validated(cfg, [key(line) for line in (*base, step)])
    except ConfigError as error:
        try:  # it may need what comes before it
            lines = [*base, *before, step]
            validated(compose(CONFIG_NAME, overrides=lines), [key(line) for line in lines])
        except ConfigError:
            return "; ".join(error.problems)
    return None


def _several(plain: DictConfig, step: str) -> str | None:
    """Say why a step is more than one setting: a choice of a group, or a dictionary."""
    name, value = key(step).partition("@")[0], step.partition("=")[2].strip()
    group = name in plain or name in ONLY_CHOSEN
    if value.startswith("{") and (group or OmegaConf.is_dict(OmegaConf.select(plain, name))):
        several = "a dictionary is several settings at once"
        return f"{several}; give each as a step, like {name}.NAME=VALUE"
    if group and "." not in name and name not in CHOICES and not value.startswith("{"):
        return (
            f"{name}=… is many settings at once; give it as part of the starting point, and single "
            "settings as steps"
        )
    return None


def _unknown(cfg: DictConfig, dotted: str) -> str | None:
    """Say which part of a key is not there, with the nearest names; None if all of it is."""
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            known = [str(name) for name in node] if isinstance(node, DictConfig) else []
            return f"there is no {part!r}; {nearest(part, known)}"
        node = node[part]
    return None


def among(name: str, names: Sequence[str]) -> bool:
    """Tell whether a key is one of these, or below one of them."""
    return any(name == own or name.startswith(f"{own}.") for own in names)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return next(iter(str(cause).strip().splitlines()), type(error).__name__)
