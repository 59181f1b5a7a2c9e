"""Searches for the best configuration inside a memory budget, as Optuna studies."""
