"""`task=watch`: the memory of a run, or of any process, while it goes on."""
