"""The search for the best error inside a memory budget: `search` is the loop."""
