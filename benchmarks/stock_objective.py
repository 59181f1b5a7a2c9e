"""The program that the stock sweeper is given: train once, return the validation's error.

    python benchmarks/stock_objective.py -m hydra/sweeper=optuna model.embed_dim=choice(16,32) …

``hydra/sweeper=optuna`` wants a number, and takes whatever is raised for a failed trial; a run
that ends without completing therefore raises here. With STOCK_BAD_VALUE in the environment, the
patch that comes to mind first: a run that memory was not enough for returns that number.
"""

from __future__ import annotations

import os

import hydra
from omegaconf import DictConfig

from expt.config.compose import conf_dir, register


def train(cfg: DictConfig) -> float:
    """Train, and return the best epoch's ``val/mae`` in mph."""
    from expt.config.command_line import run_task
    from expt.result import MEMORY_ERRORS

    bad = os.environ.get("STOCK_BAD_VALUE")
    try:
        result = run_task(cfg)
        if result.status != "completed":
            raise RuntimeError(result.stop_reason)
    except Exception as error:
        names = (type(error).__name__, str(error))
        if bad is None or not any(name.startswith(MEMORY_ERRORS) for name in names):
            raise
        return float(bad)
    return float(result.metrics["val/mae"])


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register()
    hydra.main(config_path=str(conf_dir()), config_name="config", execution_whitelist=["expt.*"])(
        train
    )()
