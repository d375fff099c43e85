"""End a child process when its parent ends; otherwise the child would keep the parent's locks."""

import os
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any


def die_when(watcher_ends: Callable[[], Any]) -> None:
    """End this process as soon as `watcher_ends` returns; half-done work helps nobody, and checkpoints stay."""

    def watch() -> None:
        watcher_ends()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def die_with_parent() -> None:
    """End this process, a child that multiprocessing made, with its parent, however that ends."""
    parent = parent_process()
    if parent is not None:
        die_when(lambda: wait([parent.sentinel]))
