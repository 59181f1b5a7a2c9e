"""The peak before a run: a step on fake tensors, and what the device makes of it."""
