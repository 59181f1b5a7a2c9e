"""What the server of a search has done before it forks, so that no trial spends seconds on it.

`expt.run.server.start_server` is given this module; importing it is all. Nothing in here makes a
tensor, a thread or a CUDA context, of which a forked process would inherit a half. (OpenBLAS, in
numpy and scipy, has threads where it may have more than one; it ends them itself before a fork, and
begins them anew.) Nothing of the user's own is imported either: a trial reads that code as it is
when the trial starts.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

from expt.config.compose import compose_lines
from expt.config.validate import validated

# MLflow imports pyarrow, whose second allocator would have a thread, for nothing: it is not used.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
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
from expt.search.program import program  # noqa: E402

program()  # the files as they are imported here, for the processes that run them
with suppress(Exception):  # a trial that has the same trouble says so
    rehearse()
    from PIL import Image

    Image.preinit()
