"""Recording runs: a journal on disk first, a tracking server when it answers."""
