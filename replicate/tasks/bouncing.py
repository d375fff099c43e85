"""A digit that bounces: four frames of 16x16 pixels in which one of scikit-learn's 8x8 digits moves at constant speed.

Ours, after the bouncing balls of Sutskever, Hinton and Taylor 2008 (NIPS 21) and Moving MNIST of Srivastava et al. 2015
(arXiv:1502.04681). The generator, all of it:

1. The digit is drawn uniformly, with replacement, from the images of the part (training, validation, test) of the
   task `digits`, so that no image crosses from one part to another.
2. Its upper left corner (row, column) is drawn uniformly from {0..8}^2, its velocity from {-2..2}^2 without (0, 0).
3. At time t a coordinate stands at fold(p + v t), with fold(u) = 8 - |8 - (u mod 16)|: the walls reflect elastically,
   and a corner that would pass a wall by d is d away from it on the near side.
4. A frame is 0 outside the digit and holds its levels 0..16 inside; it is never clipped, as the corner stays in {0..8}.

The first OBSERVED = 3 frames are the condition x, the fourth is y. Three corners determine the fourth: at |v| <= 2
there is at most one reflection in two steps, so that one of the two observed steps is free, and the faster one is. Two
would not do: a digit that has been at 7 twice rests there, or has touched the wall in between. What is ambiguous is
where the corner is: a digit's blank margin hides it, and where no observed step touched a wall, whether the next one
will must be told from the digit's shape.
"""

import torch
from torch import Tensor

from replicate.model import DataInfo
from replicate.tasks.base import Task, TaskEntry
from replicate.tasks.densities import data_seed
from replicate.tasks.digits import LEVELS, textbook_split

NAME = "bouncing"
CANVAS, DIGIT = 16, 8
#: largest coordinate of the digit's corner
WALL = CANVAS - DIGIT
#: largest speed along an axis, pixels a frame
SPEED = 2
FRAMES, OBSERVED = 4, 3
SIZES = (4000, 1000, 1000)
INFO = DataInfo(FRAMES * CANVAS**2, "levels", LEVELS, (FRAMES * CANVAS, CANVAS))


def corner(start: Tensor, velocity: Tensor, time: int) -> Tensor:
    """Coordinates in pixels at an integer time, between walls at 0 and WALL; int64, of the arguments' shape."""
    return WALL - (WALL - (start + velocity * time) % (2 * WALL)).abs()


def render(images: Tensor, corners: Tensor) -> Tensor:
    """Frames (n, CANVAS, CANVAS) with each image (n, 8, 8) at its corner (n, 2) = (row, column)."""
    inside = torch.arange(DIGIT)
    rows = (corners[:, :1] + inside)[:, :, None]
    columns = (corners[:, 1:] + inside)[:, None, :]
    frames = images.new_zeros(len(images), CANVAS, CANVAS)
    frames[torch.arange(len(images))[:, None, None], rows, columns] = images
    return frames


def sequences(images: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n sequences of digits from images (m, 64) of levels, by a generator on the CPU.

    Returns:
        (frames (n, FRAMES, CANVAS, CANVAS), which image each shows (n,)).
    """
    chosen = torch.randint(len(images), (n,), generator=generator)
    start = torch.randint(WALL + 1, (n, 2), generator=generator)
    side = 2 * SPEED + 1
    moving = torch.randint(side * side - 1, (n,), generator=generator)
    moving = moving + (moving >= side * side // 2)  # the one in the middle would be (0, 0)
    velocity = torch.stack([moving // side, moving % side], dim=1) - SPEED
    picked = images[chosen].view(n, DIGIT, DIGIT)
    return torch.stack([render(picked, corner(start, velocity, t)) for t in range(FRAMES)], dim=1), chosen


def bouncing() -> Task:
    """Build the task: rows are the four frames in order, levels 0..16, labels are those of the digits."""
    parts, labels = [], []
    for (images, classes), n, part in zip(textbook_split(), SIZES, ("train", "valid", "test"), strict=True):
        frames, chosen = sequences(images, n, torch.Generator().manual_seed(data_seed(NAME, part)))
        parts.append(frames.flatten(1))
        labels.append(classes[chosen])
    train, valid, test = parts
    return Task(NAME, BOUNCING.about, INFO, train, valid, test, labels=(labels[0], labels[1], labels[2]))


BOUNCING = TaskEntry("four frames of an 8x8 digit that bounces on a 16x16 canvas", bouncing, "data", info=INFO)
