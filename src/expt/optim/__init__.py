"""Learning-rate schedules; optimizers come from torch by `_target_`."""
