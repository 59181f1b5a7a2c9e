"""The verbs of the command line, a module each: train, plan, search and the others."""
