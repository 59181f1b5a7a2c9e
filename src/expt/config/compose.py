"""Around Hydra's composition: where `conf/` is, what the YAML files may use, what was given."""

from __future__ import annotations

import os
import re
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from expt.config.schema import COMMAND_NODES, Config, Preset
from expt.errors import ConfigError
from expt.result import LAUNCH_NAME, load_launch

CONFIG_NAME = "config"
OPTIONAL_GROUPS = ("memory", "experiment", "debug", "search")
"""Groups of which nothing may be chosen."""
OF_THE_RUN = {
    *COMMAND_NODES, "task", "hydra", "search", "debug", "callbacks",
    "trainer.resume", "tracking.parent", "memory.plan_file", "memory.budget",
}  # fmt: skip
"""Keys and groups of a training's command line that are nothing to who uses its model."""


def conf_dir() -> Path:
    """Return the absolute folder of YAML files: the checkout's, else the wheel's."""
    checkout = Path(__file__).resolve().parents[3] / "conf"
    if (checkout / "config.yaml").exists():
        return checkout
    return Path(str(files("expt") / "conf"))


def groups() -> list[str]:
    """Return the names of the groups that a command line may choose from."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def register() -> None:
    """Make the schema and the resolvers known to Hydra; may be called again."""
    known = ConfigStore.instance()
    if "schema.yaml" not in known.repo:  # made of the dataclasses, it takes a fifth of composing
        known.store(name="schema", node=Config)
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
    """Accept what is meant: ``memory=lite``, ``experiment=null``, ``trainer.resume=RUN_DIR``.

    A directory to resume becomes the settings that run was started with, then those given now,
    in its directory. The current folder becomes the one it was started in, so that its relative
    paths and the user's own modules mean what they meant.

    Raises:
        ConfigError: the directory is not a run's, or a group is set to nothing that needs one.

    """
    prepared = [re.sub(r"^memory=", "+memory=", argument) for argument in arguments]
    # Only memory is added to the defaults; for the others the plus is a habit to forgive.
    chosen = [name for name in groups() if name != "memory"]
    prepared = [re.sub(rf"^\+({'|'.join(chosen)})=", r"\1=", a) for a in prepared]
    merged = _with_settings_of_resumed(_with_settings_of(prepared))
    # Only now: until then, choosing nothing is what takes the place of an earlier choice.
    return [argument for argument in merged if not _chooses_nothing(argument)]


def _with_settings_of_resumed(prepared: list[str]) -> list[str]:
    """Put the settings of the run that ``trainer.resume`` names before those given."""
    resume = [a for a in prepared if re.match(r"^\+{0,2}trainer\.resume=", a)]
    target = _text_of(resume[-1]) if resume else ""
    if not target or target.lower() in ("true", "false", "null") or target.isdigit():
        return prepared
    if {"-m", "--multirun"} & set(prepared):
        raise ConfigError(
            f"trainer.resume={target} goes on with one run, and -m starts several; to go on with "
            "a multirun, give hydra.sweep.dir=ITS_FOLDER and trainer.resume=true"
        )
    run_dir = Path(target).absolute()
    launch = load_launch(run_dir)
    if launch is None and (run_dir / LAUNCH_NAME).exists():
        raise ConfigError(
            f"trainer.resume={target}: its {LAUNCH_NAME}, which says how the run was started, is "
            "damaged; give the run's settings again, with trainer.resume=true "
            f"{typed('hydra.run.dir', target)}"
        )
    if launch is None:
        raise ConfigError(
            f"trainer.resume={target}: no run was started in this folder (it has no launch.json); "
            "give a run's directory, or trainer.resume=true with hydra.run.dir=FOLDER"
        )
    if os.getcwd() != launch["cwd"] and Path(launch["cwd"]).is_dir():
        print(f"resuming in {launch['cwd']}, where this run was started")
        os.chdir(launch["cwd"])
    rest = [argument for argument in prepared if argument not in resume]
    given = {key(argument) for argument in rest}
    earlier = [line for line in launch["overrides"] if key(line) not in given]
    if launch["config_dir"] and config_dir(rest) is None:
        earlier.insert(0, f"--config-dir={launch['config_dir']}")
    directory = [] if "hydra.run.dir" in given else [setting("hydra.run.dir", run_dir)]
    return [*earlier, *rest, "trainer.resume=true", *directory]


def _with_settings_of(arguments: list[str]) -> list[str]:
    """Put the settings of the run that e.g. ``predict.run`` names before those given.

    Where it was recorded, and what it was part of, is left out; the current folder stays. Of a
    group that is chosen now, nothing that was set then is left.
    """
    named = [a for a in arguments if re.match(r"^\+{0,2}(predict|export|rollout)\.run=", a)]
    target = _text_of(named[-1]) if named else ""
    if not target or target == "null":
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(f"{named[-1]} is about one run, and -m starts several; leave -m out")
    launch = load_launch(Path(target).expanduser())
    if launch is None:
        if (Path(target).expanduser() / LAUNCH_NAME).exists():
            print(f"note: {target}/{LAUNCH_NAME} is damaged; the checkpoint's settings are used")
        return arguments
    if launch["cwd"] not in sys.path:  # for the user's own modules
        sys.path.append(launch["cwd"])
    given = {key(argument) for argument in arguments}
    earlier = [
        line
        for line in launch["overrides"]
        if key(line) not in given | OF_THE_RUN
        and key(line).partition(".")[0] not in given | OF_THE_RUN
    ]
    if launch["config_dir"] and config_dir(arguments) is None:
        earlier.insert(0, f"--config-dir={launch['config_dir']}")
    return [*earlier, *arguments]


def open_composition(own: str | None = None) -> None:
    """Let `hydra.compose` find `conf/`, and first of all the user's own folder, if there is one."""
    register()
    GlobalHydra.instance().clear()
    search_path = create_config_search_path(str(conf_dir()))
    if own is not None:
        anchor = SearchPathQuery(provider="schema")
        search_path.prepend("command-line", f"file://{Path(own).absolute()}", anchor)
    Hydra.create_main_hydra2("expt", search_path)


def compose_lines(lines: Sequence[str], own: str | None = None) -> DictConfig:
    """Compose a configuration from a command line's settings, outside of a Hydra job.

    Raises:
        HydraException, OmegaConfBaseException: Hydra refuses them.

    """
    open_composition(own)
    try:
        return compose(CONFIG_NAME, overrides=prepare_arguments(lines))
    finally:
        GlobalHydra.instance().clear()


def key(override: str) -> str:
    """Return the dotted key or group of ``key=value``, without Hydra's prefixes."""
    return override.partition("=")[0].lstrip("+~")


def quoted(text: object) -> str:
    """Return a text in the quotes of Hydra's grammar, whatever is in it."""
    return str(QuotedString(str(text), Quote.double).with_quotes())


def setting(name: str, value: object) -> str:
    """Return a text as a setting of a command line, whatever is in it."""
    return f"{name}={quoted(value)}"


def readable_setting(name: str, value: object) -> str:
    """Return the same for a reader, in quotes only where it would be read as something else."""
    line = f"{name}={value}"
    try:
        override = OverridesParser.create().parse_override(line)
        same = not override.is_sweep_override() and override.value() == str(value)
    except HydraException:
        same = False
    return line if same else setting(name, value)


def typed(name: str, value: object) -> str:
    """Return how to type that setting, in the shell's quotes where it needs them."""
    return shlex.quote(readable_setting(name, value))


def _text_of(argument: str) -> str:
    """Return the value of a setting without the quotes that Hydra's grammar knows."""
    value = argument.partition("=")[2]
    if value[:1] not in ("'", '"'):
        return value
    try:
        text = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return value.strip("'\"")
    return text.text if isinstance(text, QuotedString) else str(text)


def overrides(arguments: Sequence[str]) -> list[str]:
    """Return the ``key=value`` arguments among a command line's."""
    found: list[str] = get_args_parser().parse_intermixed_args(list(arguments)).overrides
    return found


def config_dir(arguments: Sequence[str]) -> str | None:
    """Return the folder of the user's own YAML files, if the command line names one."""
    found: str | None = get_args_parser().parse_intermixed_args(list(arguments)).config_dir
    return found


def _chooses_nothing(argument: str) -> bool:
    """Tell whether an argument may be left out; ConfigError where something must be chosen."""
    found = re.fullmatch(r"\+?(\w+)=(null|~)?", argument)
    if found is None or found[1] not in groups():
        return False
    if found[1] not in OPTIONAL_GROUPS:
        options = sorted(path.stem for path in (conf_dir() / found[1]).glob("*.yaml"))
        raise ConfigError(f"{argument}: one must be chosen; known names: {', '.join(options)}")
    return True
