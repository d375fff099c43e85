"""Frechet distance in the features of Inception, the FID that papers print, where its weights are on disk.

Heusel et al. 2017, arXiv:1706.08500; network and preprocessing are torch-fidelity's (the last average pool of the
network of 2015, images resized as TensorFlow 1 does). The weights lie below REPLICATE_DATA and are used only if they
have the published sha256: torch-fidelity unpickles them. FID falls with the number of samples, and with fewer of them
than features the covariance has no full rank: beside a printed number, which has 50,000, stands ours with n in its row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from replicate.data.files import contents, data_file, find, sha256

WEIGHTS = "inception/weights-inception-2015-12-05-6726825d.pth"
ORIGIN = "https://github.com/toshas/torch-fidelity"
#: the average pool behind the last block, 2048 numbers
LAYER = "2048"
#: images that pass the network at a time
CHUNK = 100


@dataclass(frozen=True)
class Inception:
    """The network.

    Attributes:
        network: uint8 images (n, 3, height, width) to a tuple of one tensor (n, F).
        sha256: of the weights' file.
    """

    network: nn.Module
    sha256: str

    @torch.no_grad()
    def features(self, x: Tensor, image: tuple[int, int], device: torch.device) -> Tensor:
        """Features (n, F), on the CPU, of images x (n, planes * height * width), values 0..255; grey has one plane."""
        network, height, width = self.network.to(device), *image
        planes = x.shape[1] // (height * width)
        whole = x.round().clamp(0, 255).to(torch.uint8).unflatten(1, (planes, height, width))
        parts = whole.expand(-1, 3, -1, -1).split(CHUNK)
        return torch.cat([network(part.to(device))[0].cpu() for part in parts])


def unavailable() -> str:
    """Why there are no Inception features here, in words; "" where there are."""
    if find(WEIGHTS) is None:
        return f"{WEIGHTS} is not in REPLICATE_DATA; `replicate data fetch {WEIGHTS}` gets it"
    try:
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch is a RuntimeError
        reason = str(error).splitlines()[0]
        return f"torch-fidelity cannot be imported ({reason}); pip install 'scoreboard-replicate[inception]'"
    return ""


@cache
def inception() -> Inception:
    """The network with the published weights, read once a process.

    Raises:
        UsageError: the weights are not there, or are other ones.
        ImportError: torch-fidelity is not installed.
    """
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    content = contents(data_file(WEIGHTS, ORIGIN))
    with TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        path.write_bytes(content)
        network = module.FeatureExtractorInceptionV3("inception", [LAYER], feature_extractor_weights_path=str(path))
    return Inception(network, sha256(WEIGHTS))
