"""Experiments over the tasks: their units, the command that runs them, and its tables."""
