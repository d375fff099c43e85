"""Let SIGINT and SIGTERM stop a sweep so that nothing computed is lost."""

import signal
from collections.abc import Callable
from types import FrameType

from replicate.errors import Interrupted, Stopped
from replicate.resume import stop_current


def until_signal(work: Callable[[], bool]) -> bool:
    """Return work()'s result, or False when SIGINT or SIGTERM ends it; a second signal ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not stop_current():  # a run in this process saves itself first
            raise Interrupted

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work()
    except (Interrupted, Stopped):
        return False
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
