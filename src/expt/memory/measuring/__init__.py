"""Bytes counted, limited and asked of a device."""
