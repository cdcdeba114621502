"""Errors that the command line shows as one line, without a traceback."""


class BadInput(ValueError):
    """The user's input is wrong; nothing was started. Exit code 2."""


class RunFailed(RuntimeError):
    """A run could not go on; what it had done is kept. Exit code 1."""
