"""What a run may use, and how often it saves: nothing here can change a number, so none of it is in a spec."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one run.

    Attributes:
        seconds: wall time of one session; a run that takes longer is stopped and counts as failed. The next call
            resumes from its last checkpoint.
        memory_mb: private memory in megabytes (RLIMIT_DATA); None for no limit.
        checkpoint_every: seconds between checkpoints.
        grace: seconds that a run which is asked to stop has to save itself before it is killed.
    """

    seconds: float = 7200.0
    memory_mb: int | None = None
    checkpoint_every: float = 30.0
    grace: float = 20.0


DEFAULT = Limits()
