"""Every exception of the suite that a caller may want to catch; this module imports nothing."""


class UsageError(ValueError):
    """The user asked for something that does not exist or does not fit; the message says what to do."""


class FetchError(UsageError):
    """A file could not be fetched; the message has each address with what went wrong there."""


class ClaimError(ValueError):
    """A claims file is wrong; the message has its name, the line and what to write there."""


class RecordError(ValueError):
    """What was read is no record; the message has every reason, one per line."""


class ReportError(ValueError):
    """The records cannot be reported; the message says which file and what to do."""


class TrainingError(RuntimeError):
    """Training cannot continue: the loss is not a number."""


class ModelError(RuntimeError):
    """A model breaks its contract; the message has the method, what it returned and what is expected."""


class NotANumber(RuntimeError):
    """A measurement came out as nan or infinity."""


class TimeLimit(RuntimeError):
    """The run took longer than it may."""


class ClusterLost(OSError):
    """The scheduler or its last worker went away during a sweep; what is finished is kept."""


class Exited(UsageError):
    """A plug-in's code tried to end the program; the message has what it raised and where."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived where no run could save itself."""


class Stopped(BaseException):
    """The run was asked to stop and has saved what it has. No `except Exception` may take it for a failure."""
