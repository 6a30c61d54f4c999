"""Errors that the command line shows as one line. Imports nothing."""


class UserError(Exception):
    """An error of the user rather than the program; its text says what to do."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model is missing, damaged or of an unknown format."""
