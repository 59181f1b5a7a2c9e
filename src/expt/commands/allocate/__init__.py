"""`task=allocate`: a memory budget divided, and what fits into it."""
