"""Every test computes on one thread, as every run does; property tests draw the same cases every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
