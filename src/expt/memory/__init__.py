"""Measuring the bytes that tensors take on a device."""
