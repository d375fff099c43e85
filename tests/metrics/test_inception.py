"""Inception features: only with the published weights, and images reach the network as torch-fidelity expects them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from replicate.data.catalog import catalog
from replicate.errors import UsageError
from replicate.experiments import image_scores as score_images
from replicate.metrics import inception
from replicate.metrics.quality import frechet
from replicate.runs.spec import experiment_spec

CONTENT = b"weights"
CPU = torch.device("cpu")


class Extractor(nn.Module):
    """Stands in for FeatureExtractorInceptionV3: the mean of each channel's upper and lower half."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048"]
        assert Path(feature_extractor_weights_path).read_bytes() == CONTENT
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        self.seen.append(x)
        return (x.float().unflatten(2, (2, -1)).mean((3, 4)).flatten(1),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Made-up weights under the published name and digest, and a torch-fidelity to load them."""
    entry = catalog()[inception.WEIGHTS]
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr("replicate.data.files.expected", lambda path: replace(entry, sha256=digest, size=len(CONTENT)))
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    path = tmp_path / inception.WEIGHTS
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inception.inception.cache_clear()
    yield path
    inception.inception.cache_clear()


def test_grey_and_colour_images_reach_the_network_in_three_planes(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "CHUNK", 3)
    assert inception.unavailable() == ""
    found = inception.inception()
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    grey = torch.tensor([-3.0, 0.4, 254.6, 300.0]).expand(7, 4)
    assert found.features(grey, (2, 2), CPU).tolist() == [[0.0, 255.0] * 3] * 7
    assert [len(x) for x in found.network.seen] == [3, 3, 1]
    colour = torch.arange(24.0).view(2, 12)
    found.features(colour, (2, 2), CPU)
    assert torch.equal(found.network.seen[-1], colour.to(torch.uint8).view(2, 3, 2, 2))


def test_other_weights_are_refused_before_anything_reads_them(weights: Path) -> None:
    weights.write_bytes(b"others!")
    with pytest.raises(UsageError, match=r"7ab00dcd4748.*gets it again"):
        inception.inception()


def test_what_is_missing_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "torch-fidelity cannot be imported" in inception.unavailable()
    assert "[inception]" in inception.unavailable()
    weights.unlink()
    assert f"{inception.WEIGHTS} is not in REPLICATE_DATA" in inception.unavailable()


def test_the_weights_enter_the_hash_of_what_reads_them_and_of_nothing_else(weights: Path) -> None:
    reads, other = score_images.VP_LIKELIHOOD, replace(score_images.VP_LIKELIHOOD, optional_files=())
    assert reads.optional_files == (inception.WEIGHTS,)
    here = experiment_spec("scoreflow", reads, 0, "full").run_id()
    assert here != experiment_spec("scoreflow", other, 0, "full").run_id()
    weights.unlink()
    assert experiment_spec("scoreflow", reads, 0, "full") == experiment_spec("scoreflow", other, 0, "full")


def test_the_distance_in_the_real_network_is_zero_between_equal_sets_and_grows_with_noise() -> None:
    if why := inception.unavailable():
        pytest.skip(why)
    x = torch.randint(0, 256, (40, 784), generator=torch.Generator().manual_seed(0)).float()
    features = inception.inception().features(x, (28, 28), CPU)
    assert features.shape == (40, 2048)
    assert frechet(features, features).value == pytest.approx(0.0, abs=1e-3)
    darker = inception.inception().features(x / 2, (28, 28), CPU)
    assert frechet(features, darker).value > 1
