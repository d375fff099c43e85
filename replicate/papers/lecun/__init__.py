"""Inference by optimisation of a conditional energy: y* = argmin_y F(x, y).

LeCun, Chopra, Hadsell, Ranzato and Huang 2006, "A Tutorial on Energy-Based Learning": training makes the energy of
right pairs of observation and answer low and of wrong pairs high, inference searches for the lowest answer. The
tutorial prints no numbers for tasks like these; the claims here are bars of this suite, on two tasks of its own:

- halves: the lower four rows of a digit from the upper four (the textbook's split of the 8x8 digits; no image of the
  test part is in the training part, and the nearest training image is as far from a test image, 0.65 in units of the
  largest level at the least, as training images are from one another, 0.59).
- bouncing: the fourth frame from the first three (`replicate.tasks.bouncing`).

A right pair is a test x with its own y, a wrong one with the y of another test example: "random" takes one at random
for each x, "all" takes every one, "first" requires that the own y be the lowest of all.

Deviations: the tutorial's losses compare the right answer with the most offending wrong one; here the wrong ones are
those of the other rows of the batch, and on the frames the last frame displaced at random, by ranking noise contrast,
and denoising score matching shapes the wells (`replicate.energies.conditional`). On the frames the energy has a latent
variable, the displacement, summed out at temperature 1.
"""

from replicate.experiments import Paper
from replicate.papers.lecun.families import completions
from replicate.papers.lecun.inference import frames, halves

PAPER = Paper("lecun", __file__, experiments=(halves, frames, completions))
