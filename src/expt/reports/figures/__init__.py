"""Figures of many runs, in one style."""
