"""What the server of a search has done before it forks, so that no trial spends seconds on it.

`expt.run.process.start_server` is given this module; importing it is all. Nothing in here makes a
tensor, a thread or a CUDA context, of which a forked process would inherit a half. Nothing of the
user's own is imported either: a trial reads that code as it is when the trial starts.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

from expt.config.compose import compose_lines
from expt.config.validate import validated

USED_BY_A_TRIAL = (
    "expt.commands.train",
    "expt.jobs.traffic.alternating",
    "expt.jobs.traffic.data",
    "expt.search.predicting",
    "hydra.main",
    "hydra._internal.core_plugins.basic_launcher",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "scipy.stats",  # the trend of memory, at the end of a run
)


def rehearse() -> None:
    """Compose and judge a configuration of our own: the grammar and the types are then read."""
    validated(compose_lines(["tracking=none", "trainer.device=cpu"]))  # CUDA is not asked for
    # Plugins are looked for again by each process, which may have a folder more to look in.
    Singleton._instances.pop(Plugins, None)


for name in USED_BY_A_TRIAL:
    importlib.import_module(name)
with suppress(Exception):  # a trial that has the same trouble says so
    rehearse()
    from PIL import Image

    Image.preinit()
