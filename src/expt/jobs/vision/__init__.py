"""Parts against the memory traps of models that look at images; docs/vision-traps.md."""
