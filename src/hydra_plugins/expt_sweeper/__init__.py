"""The sweeper ``hydra/sweeper=expt``; what it does is in `expt.search`."""
