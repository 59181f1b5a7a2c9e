"""`task=expand`: from a preset, one parameter at a time."""
