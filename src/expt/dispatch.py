"""From the job that Hydra has set up to the task that it names."""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig

from expt.composition import key
from expt.construction import RunContext
from expt.errors import ConfigError, ExptError, UserError
from expt.files import remove_empty_date

log = logging.getLogger(__name__)

HYDRA_FILES = {".hydra", "expt.log"}
"""What Hydra itself leaves in a run's directory before a task starts."""


def run_task(cfg: DictConfig) -> Any:
    """Run the configured task; leave nothing behind if it refuses the configuration or data."""
    context = _context(cfg)
    task: Callable[[DictConfig, RunContext], Any] = get_method(cfg.task._target_)
    failed = False
    try:
        _refuse_search(cfg)
        return task(cfg, context)
    except Exception as error:
        if isinstance(error, UserError):
            _remove_traces(context.run_dir)
        if context.parent_dir is not None:
            if not isinstance(error, ExptError):
                # Hydra shows one error at the end; the others of a grid would be lost.
                log.error("job %s failed: %s", context.run_dir.name, error)
            # Hydra keeps the error, whose frames keep the model that the next job has no room for.
            traceback.clear_frames(error.__traceback__)
            failed = True
        raise
    finally:
        if failed:
            _free_memory()


def _refuse_search(cfg: DictConfig) -> None:
    """Refuse a search that is not run as one; its trials know their number."""
    if cfg.search is None or cfg.search.trial is not None:
        return
    raise ConfigError(
        f"search={HydraConfig.get().runtime.choices.get('search')} is a search over many trials: "
        "start it with python -m expt -m search=NAME (and the sweeper its file names); to train "
        "once, leave search out"
    )


def _context(cfg: DictConfig) -> RunContext:
    hydra_cfg = HydraConfig.get()
    own = [
        source.path
        for source in hydra_cfg.runtime.config_sources
        if source.provider == "command-line"
    ]
    lines = [line for line in hydra_cfg.overrides.task if key(line) != "trainer.resume"]
    is_child = hydra_cfg.mode == RunMode.MULTIRUN
    parent = Path(hydra_cfg.sweep.dir) if is_child else cfg.tracking.parent
    return RunContext(
        run_dir=Path(hydra_cfg.runtime.output_dir),
        parent_dir=None if parent is None else Path(parent).absolute(),
        overridden=frozenset(key(line) for line in hydra_cfg.overrides.task),
        launch={
            "overrides": lines,
            "cwd": hydra_cfg.runtime.cwd,
            "config_dir": own[0] if own else None,
        },
    )


def _remove_traces(run_dir: Path) -> None:
    """Remove what Hydra wrote for a job that never started, and the folders made for it."""
    if not {entry.name for entry in run_dir.iterdir()} <= HYDRA_FILES:
        return
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    with suppress(OSError):
        (run_dir / "expt.log").unlink(missing_ok=True)
        run_dir.rmdir()
        remove_empty_date(run_dir.parent)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
