"""The bouncing digits against a simulation step by step, and against the digits that they are made of."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from replicate.tasks.bouncing import BOUNCING, CANVAS, FRAMES, OBSERVED, SIZES, SPEED, WALL, corner, render, sequences
from replicate.tasks.digits import textbook_split

TASK = BOUNCING.load()


def simulated(position: int, velocity: int, steps: int) -> int:
    """A ball between two walls, moved pixel by pixel and turned round where it stands at a wall."""
    direction = 1 if velocity > 0 else -1
    for _ in range(abs(velocity) * steps):
        if not 0 <= position + direction <= WALL:
            direction = -direction
        position += direction
    return position


@given(st.integers(0, WALL), st.integers(-SPEED, SPEED), st.integers(0, 40))
def test_a_corner_moves_like_a_ball_between_two_walls(position: int, velocity: int, time: int) -> None:
    found = corner(torch.tensor(position), torch.tensor(velocity), time)
    assert int(found) == simulated(position, velocity, time)


def test_three_corners_determine_the_fourth_and_two_do_not() -> None:
    def futures(observed: int) -> dict[tuple[int, ...], set[int]]:
        found: dict[tuple[int, ...], set[int]] = {}
        for position, velocity in product(range(WALL + 1), range(-SPEED, SPEED + 1)):
            path = [simulated(position, velocity, t) for t in range(FRAMES)]
            found.setdefault(tuple(path[:observed]), set()).add(path[observed])
        return found

    assert all(len(after) == 1 for after in futures(OBSERVED).values())
    assert futures(2)[7, 7] == {5, 7}


def test_the_data_are_the_ones_published() -> None:
    assert TASK.sha256() == "d19b8cf8797768433b1b0eb7572d4b5e691d02ec595c4cc253838e5b5c0c0486"
    assert tuple(len(part) for part in (TASK.train, TASK.valid, TASK.test)) == SIZES
    assert TASK.train.shape[1] == TASK.info.dim == FRAMES * CANVAS**2


def test_every_frame_shows_one_digit_of_its_own_part_whole() -> None:
    for rows, (images, _) in zip((TASK.train, TASK.valid, TASK.test), textbook_split(), strict=True):
        sums = set(images.sum(1).tolist())
        frames = rows.view(-1, CANVAS, CANVAS)
        assert set(frames.sum((1, 2)).tolist()) <= sums


def test_no_image_crosses_from_one_part_to_another() -> None:
    parts = [set(map(tuple, images.tolist())) for images, _ in textbook_split()]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_a_sequence_is_its_image_at_the_corners_of_a_motion() -> None:
    images, labels = textbook_split()[2]
    frames, chosen = sequences(images, 50, torch.Generator().manual_seed(3))
    for sequence, which in zip(frames, chosen, strict=True):
        image = images[which].view(8, 8)
        paths = []
        for frame in sequence:
            places = [
                p
                for p in product(range(WALL + 1), repeat=2)
                if torch.equal(frame[p[0] : p[0] + 8, p[1] : p[1] + 8], image) and frame.sum() == image.sum()
            ]
            paths.append(places)
        # blank margins may leave several corners possible; one motion passes through all frames
        steps = range(-SPEED, SPEED + 1)
        motions = [
            (p, v)
            for p in paths[0]
            for v in product(steps, repeat=2)
            if v != (0, 0)
            and all((simulated(p[0], v[0], t), simulated(p[1], v[1], t)) in paths[t] for t in range(FRAMES))
        ]
        assert motions
    assert torch.equal(TASK.labels[2].bincount() > 0, labels.bincount() > 0)  # type: ignore[index]


def test_the_smallest_and_the_largest_corner_fit_on_the_canvas() -> None:
    image = torch.arange(1.0, 65.0).view(1, 8, 8)
    frames = render(image.expand(2, 8, 8), torch.tensor([[0, 0], [WALL, WALL]]))
    assert torch.equal(frames[0, :8, :8], image[0])
    assert torch.equal(frames[1, 8:, 8:], image[0])
    assert torch.equal(frames.sum((1, 2)), torch.full((2,), 64 * 65 / 2))
