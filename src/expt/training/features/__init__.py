"""What the frozen part of a model makes of every sample, computed once and read from then on."""
