"""Every test computes on one thread, as every run does."""

import torch

torch.set_num_threads(1)
