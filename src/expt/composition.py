"""Around Hydra's composition: where `conf/` is, what an argument may look like, what went wrong.

When Hydra refuses a command line it stops at the first problem and names neither the others nor
what would have been right; `explain` goes through the arguments one by one and does.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expt.construction import RunContext
from expt.errors import ConfigError, UserError, nearest
from expt.schema import Config, Preset

log = logging.getLogger(__name__)

HYDRA_FILES = {".hydra", "expt.log"}
"""What Hydra itself leaves in a run's directory before a task starts."""


def conf_dir() -> Path:
    """Return the absolute folder of YAML files: the checkout's, else the wheel's."""
    checkout = Path(__file__).resolve().parents[2] / "conf"
    if (checkout / "config.yaml").exists():
        return checkout
    return Path(str(files("expt") / "conf"))


def register() -> None:
    """Make the schema and the resolvers known to Hydra; may be called again."""
    ConfigStore.instance().store(name="schema", node=Config, replace=True)
    OmegaConf.register_resolver("by_preset", by_preset, replace=True)
    OmegaConf.register_resolver(
        "unique", lambda: uuid.uuid4().hex[:6], replace=True, use_cache=True
    )


def by_preset(table: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """Resolve ``${by_preset:{full: .., lite: .., minimal: ..}}`` on `memory.preset`.

    Without a preset the sizes are those of lite.
    """
    preset = OmegaConf.select(_root_, "memory.preset") or Preset.lite
    name = preset.name if isinstance(preset, Preset) else str(preset)
    return table[name]


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Accept ``memory=lite`` like ``+memory=lite``; find the settings of a run to resume.

    ``trainer.resume=RUN_DIR`` becomes that run's own overrides, then those given, in its
    directory.

    Raises:
        ConfigError: the directory to resume is not a run's.

    """
    prepared = [re.sub(r"^memory=", "+memory=", argument) for argument in arguments]
    resume = [a for a in prepared if re.match(r"^\+{0,2}trainer\.resume=", a)]
    target = resume[-1].partition("=")[2].strip("'\"") if resume else ""
    if not target or target.lower() in ("true", "false", "null"):
        return prepared
    run_dir = Path(target)
    saved = run_dir / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise ConfigError(
            f"trainer.resume={target}: no run was started in this folder (there is no {saved}); "
            "give a run's directory, or trainer.resume=true with hydra.run.dir=FOLDER"
        )
    given = {argument.partition("=")[0].lstrip("+~") for argument in prepared}
    earlier = [str(o) for o in OmegaConf.load(saved)]
    kept = [o for o in earlier if o.partition("=")[0].lstrip("+~") not in given]
    directory = [] if "hydra.run.dir" in given else [f"hydra.run.dir='{run_dir}'"]
    return [*kept, *prepared, *directory]


def run_task(cfg: DictConfig) -> Any:
    """Run the configured task in the job Hydra has set up; leave nothing behind if it refuses."""
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    is_child = hydra_cfg.mode == RunMode.MULTIRUN
    overridden = (override.partition("=")[0].lstrip("+~") for override in hydra_cfg.overrides.task)
    context = RunContext(
        run_dir=run_dir,
        parent_dir=Path(hydra_cfg.sweep.dir).absolute() if is_child else None,
        overridden=frozenset(overridden),
    )
    task: Callable[[DictConfig, RunContext], Any] = get_method(cfg.task._target_)
    try:
        return task(cfg, context)
    except Exception as error:
        if is_child:
            # Hydra shows one error at the end; the others of a grid would be lost.
            log.error("job %s failed: %s", hydra_cfg.job.num, error)
        if not isinstance(error, UserError):
            raise
        if {entry.name for entry in run_dir.iterdir()} <= HYDRA_FILES:
            shutil.rmtree(run_dir, ignore_errors=True)
            # Empty folders above (the date's) go too; a folder with other runs stays.
            with suppress(OSError):
                run_dir.parent.rmdir()
        raise


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return one message with every problem among the arguments and the nearest valid names."""
    register()
    GlobalHydra.instance().clear()
    overrides = [a for a in arguments if not a.startswith("-")]
    with initialize_config_dir(str(conf_dir())):
        problems = _problems(overrides)
    if not problems:
        problems = [_first_lines(error)]
    return str(ConfigError(problems))


def _problems(arguments: Sequence[str]) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    groups = {name for name in loader.list_groups("") if not name.startswith("hydra")}
    parsed, problems = [], []
    for argument in arguments:
        try:
            parsed.append(OverridesParser.create().parse_override(argument))
        except HydraException as error:
            hint = "" if "=" in argument else "; settings look like key=value or group=option"
            problems.append(f"{argument!r} cannot be read{hint} ({_first_lines(error)})")
    chosen, values = [], []
    for override in parsed:
        name = override.key_or_group
        if name not in groups:
            values.append(override)
            continue
        options = loader.get_group_options(name)
        wrong = [word for word in _words(override) if word not in (*options, "null")]
        problems += [f"{name}={word}: no such option; {nearest(word, options)}" for word in wrong]
        if not wrong:
            chosen.append(override.input_line or "")
    return problems + _value_problems(values, chosen, groups)


def _value_problems(values: list[Override], chosen: list[str], groups: set[str]) -> list[str]:
    """Try the groups, then each value on its own, so that one problem does not hide another."""
    # A sweep over a group has no single composition; its first option stands for all.
    single = [re.sub(r"=([^,\[]+),.*$", r"=\1", line) for line in chosen]
    try:
        base = compose("config", overrides=single)
    except (HydraException, OmegaConfBaseException) as error:
        return [_first_lines(error)]
    problems = []
    for override in values:
        if override.key_or_group.split(".")[0] == "hydra" or override.is_sweep_override():
            continue
        try:
            compose("config", overrides=[*single, override.input_line or ""])
        except (HydraException, OmegaConfBaseException) as error:
            known = _unknown_key(base, override.key_or_group, groups)
            problems.append(
                f"{override.input_line}: {known or _first_lines(error)}".replace("\n", " ")
            )
    return problems


def _unknown_key(cfg: DictConfig, key: str, groups: set[str]) -> str | None:
    """Say which part of a dotted key is not there, or None if all of it is."""
    node: Any = cfg
    walked: list[str] = []
    for part in key.split("."):
        names = {str(name) for name in node} if isinstance(node, DictConfig) else set()
        if part not in names:
            if not walked:
                names |= groups
            where = f" in {'.'.join(walked)}" if walked else ""
            return f"there is no {part!r}{where}; {nearest(part, names)}"
        walked.append(part)
        node = OmegaConf.select(cfg, ".".join(walked), throw_on_missing=False)
    return None


def _words(override: Override) -> list[str]:
    """Return the options an override names: one, several of a sweep, or a list."""
    if override.is_sweep_override():
        return [str(word) for word in override.sweep_string_iterator()]
    value = override.value()
    if isinstance(value, list):
        return [str(word) for word in value]
    return ["null" if value is None else str(value)]


def _first_lines(error: Exception) -> str:
    """Return what an exception says, without Hydra's pointers into its internals."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "See "))]
    return " ".join(kept[:2])
