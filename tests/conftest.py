"""Every test computes on one thread, as every run does; property tests draw the same cases every time."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

#: files that take longest go first, so that none of them is left for one process at the end
LONGEST = ("test_reproduce.py", "test_notebooks.py", "test_faults.py", "test_cluster.py", "test_models.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
