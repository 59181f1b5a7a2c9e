"""Models: one file each, plain arguments, no knowledge of configuration or data sets."""
