"""Every random stream has its own generator, seeded from what it is for."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SUITE_SEED = "scoreboard-1"


def stream_seed(*parts: object) -> int:
    """Return a 63-bit seed from the sha256 of the suite seed and the parts."""
    text = "\x1f".join([SUITE_SEED, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Streams:
    """The named generators of one run.

    The stream "batches" does not depend on the model, so that all models of a task see the same batches in the
    same order and comparisons are paired; every other stream does.
    """

    def __init__(self, task: str, model: str, seed: int, device: str = "cpu") -> None:
        self.task, self.model, self.seed, self.device = task, model, seed, device
        self._open: dict[str, torch.Generator] = {}

    def seed_of(self, stream: str) -> int:
        """Return the seed of a stream."""
        owner = "" if stream == "batches" else self.model
        return stream_seed(self.task, owner, self.seed, stream)

    def fresh(self, stream: str) -> torch.Generator:
        """Return a new generator at the stream's beginning."""
        return torch.Generator(self.device).manual_seed(self.seed_of(stream))

    def get(self, stream: str) -> torch.Generator:
        """Return the stream's one generator, which continues where its last use ended."""
        if stream not in self._open:
            self._open[stream] = self.fresh(stream)
        return self._open[stream]

    @contextmanager
    def initialisation(self) -> Iterator[None]:
        """Inside, torch's own initialisers draw from this run's "init" stream; outside nothing has changed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed_of("init"))
            yield
