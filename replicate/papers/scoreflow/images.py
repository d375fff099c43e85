"""ScoreFlow on MNIST and Fashion-MNIST: two weightings, and a dequantiser that is trained after the score model."""

from dataclasses import dataclass
from typing import cast

from replicate.experiments import Run, image_scores
from replicate.experiments.image_scores import DiffusionSettings, on_images
from replicate.runs.training import train
from replicate.score_based.diffusion import DiffusionModel
from replicate.score_based.images import LearnedDequantisation


@dataclass(frozen=True)
class VariationalSettings(DiffusionSettings):
    """Settings of a diffusion model with q(u | x) trained for it."""

    dequantiser: str = "variational"
    dequantiser_channels: int = 32
    dequantiser_steps: int = 2_000
    dequantiser_lr: float = 1e-3


def learn_dequantiser(run: Run, s: VariationalSettings) -> None:
    """Train a diffusion model and then q(u | x) for it; measure likelihoods and samples."""
    task, streams = image_scores.load(run, s), image_scores.shared_streams(run, s, "dequantiser")
    uniform, history = image_scores.train_diffusion(run, s, task)
    inner = cast(DiffusionModel, uniform.inner)
    with streams.initialisation():
        model = LearnedDequantisation(inner, task.info, channels=s.dequantiser_channels).to(run.device)
    learned = train(model, task.train, task.valid, s.training(s.dequantiser_steps, s.dequantiser_lr), streams)
    image_scores.measure_diffusion(run, s, task, model, {"score": history, "dequantiser": learned})


ON_MNIST = "VP with a U-Net, likelihood weighting: bits/dim of MNIST"
PLAIN = "the same under plain weighting at uniform times"
LEARNED = "the weights of score-mnist-vp with a learned dequantiser"
ON_FASHION = "VP with a U-Net, likelihood weighting: bits/dim of Fashion-MNIST"
WEIGHTINGS = (
    on_images("score-mnist-vp", ON_MNIST, 8, DiffusionSettings()),
    on_images("score-mnist-vp-plain", PLAIN, 8, DiffusionSettings(weighting="plain")),
    on_images("score-mnist-vp-variational", LEARNED, 9, VariationalSettings(), learn_dequantiser),
    on_images("score-fashion-vp", ON_FASHION, 8, DiffusionSettings(data="fashion-mnist")),
)
