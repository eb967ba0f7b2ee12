"""What a user can mend. Each kind has the exit code with which a command ends when it is raised."""


class UserError(ValueError):
    """The message says what happened, where, why, and the fix; commands print it without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A setting, a path or an argument has to change."""

    exit_code = 10


class DataError(UserError):
    """Training data has to change; the message names the file and the record."""

    exit_code = 11


class CheckpointError(UserError):
    """Weights or a checkpoint cannot be read, written or used as asked."""

    exit_code = 12


class InUseError(UserError):
    """Another process works in the directory."""

    exit_code = 17


class DivergedError(UserError):
    """The loss is no longer a number."""

    exit_code = 13


class HangError(UserError):
    """Something did not happen in its time."""

    exit_code = 14


class StoppedError(UserError):
    """A signal asked the run to stop, and what it had reached was saved."""

    exit_code = 15


class OutOfMemoryError(UserError):
    """The devices' memory does not suffice."""

    exit_code = 16
