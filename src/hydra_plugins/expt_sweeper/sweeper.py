"""Hydra's door to `expt.search`: hands over the composed configuration, and imports nothing yet."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from . import config as config

PRELOADED = ("expt.config.command_line", "expt.commands.search_process")
PRELOADED_FOR_TRACKING = ("mlflow", "mlflow.store.tracking.sqlalchemy_store")
"""What the server of the search's processes imports, once for all of them."""


class ExptSweeper(Sweeper):
    """Searches for the best error inside the memory budget; chosen by the files of `conf/search`.

    Args:
        sampler: node of ``hydra/sweeper/sampler=NAME``.

    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what the search needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search; `arguments` are the command line's settings."""
        from expt.errors import UserError
        from expt.run.server import start_server, stop_server

        assert self.config is not None and self.hydra_context is not None
        tracked = self.config.tracking.uri is not None
        started = start_server(PRELOADED + (PRELOADED_FOR_TRACKING if tracked else ()))
        from expt.commands.search import search  # seconds, in which the server does its imports

        try:
            return search(
                self.config, arguments, self.sampler, self.hydra_context, self.task_function
            )
        except UserError:
            if started:  # it may still import, with our output open
                stop_server()
            raise
