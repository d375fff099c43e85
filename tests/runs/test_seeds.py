"""Streams are separate, repeatable, and the batch stream is shared by all models of a task."""

from __future__ import annotations

import torch

from replicate.runs.seeds import Streams


def draw(streams: Streams, name: str) -> list[float]:
    return torch.rand(4, generator=streams.get(name)).tolist()


def test_batches_are_paired_between_models_and_nothing_else_is() -> None:
    a, b = Streams("t", "a", 0), Streams("t", "b", 0)
    assert draw(a, "batches") == draw(b, "batches")
    for stream in ("init", "noise", "evaluation", "langevin", "bootstrap"):
        assert draw(a, stream) != draw(b, stream)


def test_task_seed_and_stream_each_change_the_draws() -> None:
    reference = draw(Streams("t", "a", 0), "noise")
    assert draw(Streams("t", "a", 0), "noise") == reference
    assert draw(Streams("u", "a", 0), "noise") != reference
    assert draw(Streams("t", "a", 1), "noise") != reference
    assert draw(Streams("t", "a", 0), "evaluation") != reference


def test_one_stream_does_not_disturb_another() -> None:
    quiet, busy = Streams("t", "a", 0), Streams("t", "a", 0)
    for _ in range(5):
        draw(busy, "evaluation")
    assert draw(quiet, "noise") == draw(busy, "noise")


def test_a_stream_goes_on_and_a_fresh_one_begins_again() -> None:
    s = Streams("t", "a", 0)
    first, second = draw(s, "noise"), draw(s, "noise")
    assert first != second
    assert torch.rand(4, generator=s.fresh("noise")).tolist() == first


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    s = Streams("t", "a", 0)
    with s.initialisation():
        a = torch.nn.Linear(3, 3).weight.clone()
    with s.initialisation():
        b = torch.nn.Linear(3, 3).weight.clone()
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
