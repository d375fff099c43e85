"""The features of Inception, for the FID that papers print, where its weights are on disk.

Heusel et al. 2017, arXiv:1706.08500; network and preprocessing are torch-fidelity's (the last average pool of the
network of 2015, images resized as TensorFlow 1 does). The weights are below REPLICATE_DATA and are used only if they
have the published sha256, because torch-fidelity unpickles them. FID falls with the number of samples, and with fewer
of them than features the covariance has no full rank: a printed number has 50,000, and the row of ours states its n.
"""

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
#: images per call of the network
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
        """Return features (n, F), on the CPU, of images x (n, planes * height * width), 0..255; grey has one plane."""
        network, height, width = self.network.to(device), *image
        planes = x.shape[1] // (height * width)
        whole = x.round().clamp(0, 255).to(torch.uint8).unflatten(1, (planes, height, width))
        parts = whole.expand(-1, 3, -1, -1).split(CHUNK)
        return torch.cat([network(part.to(device))[0].cpu() for part in parts])


def unavailable() -> str:
    """Return why this machine has no Inception features; "" where it has them."""
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
    """Return the network with the published weights, read once per process.

    Raises:
        UsageError: the weights are missing, or have another sha256.
        ImportError: torch-fidelity is not installed.
    """
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    content = contents(data_file(WEIGHTS, ORIGIN))
    with TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        path.write_bytes(content)
        network = module.FeatureExtractorInceptionV3("inception", [LAYER], feature_extractor_weights_path=str(path))
    return Inception(network, sha256(WEIGHTS))
