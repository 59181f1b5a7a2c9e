"""Memory over the time of a run: readings, alarms, tidying up."""
