"""Errors that the command line shows as one line. Imports nothing."""


class UserError(Exception):
    """A mistake in what was asked for, not in the program: its text says what to do."""
