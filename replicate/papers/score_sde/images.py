"""score SDE on MNIST: sub-VP and VE beside ScoreFlow's VP, and NCSN (Song and Ermon 2019, 1907.05600).

NCSN has the U-Net of the diffusion models in place of RefineNet, with the paper's levels and the released code's step,
twice the printed one, and 12,000 training steps in place of 200,000.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicate.experiments import Run, image_scores
from replicate.experiments.image_rows import sheet
from replicate.experiments.image_scores import DiffusionSettings, ImageSettings, on_images
from replicate.model import Estimate
from replicate.runs.training import train
from replicate.score_based.images import DequantisedImages, build_ncsn, inpaint
from replicate.score_based.matching import tweedie
from replicate.score_based.ncsn import NCSN


@dataclass(frozen=True)
class NCSNSettings(ImageSettings):
    """Settings of NCSN; `inpainted` test images are completed."""

    steps: int = 12_000
    sigma_max: float = 2.0
    sigma_min: float = 0.02
    levels: int = 10
    steps_per_level: int = 100
    step_size: float = 0.4
    inpainted: int = 500


@torch.no_grad()
def completions(inner: NCSN, y: Tensor, known: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the columns of the images y (n, D) that are not known anew, by algorithm 2."""
    start = inner.sigmas[0] * torch.randn(y.shape, generator=generator, device=y.device)
    eps = inner.step_size * float(inner.sigmas[-1]) ** 2
    chain = inpaint(inner.score_at_level, inner.sigmas, y, known, start, inner.steps_per_level, eps, generator)
    return torch.where(known, y, chain.samples)


def hidden_error(found: Tensor, truth: Tensor, known: Tensor) -> Estimate:
    """Root mean square error over the pixels (n, D) that are not known."""
    square = Estimate.mean_of((found - truth)[:, ~known].square().mean(1), "estimate", "grey levels")
    root = math.sqrt(square.value)
    return replace(square, value=root, stderr=square.stderr / (2 * root))


@torch.no_grad()
def denoised(inner: NCSN, y: Tensor) -> Tensor:
    """Tweedie's mean at the last level, the step that `annealed_langevin` can end with."""
    return tweedie(y, inner.score(y), float(inner.sigmas[-1]))


def annealed(run: Run, s: NCSNSettings) -> None:
    """Train NCSN; sample with and without a denoising step at the end of the same chains; inpaint lower halves."""
    task, streams = image_scores.load(run, s), image_scores.shared_streams(run, s, "unet")
    noise = (s.sigma_max, s.sigma_min, s.levels, s.steps_per_level, s.step_size)
    with streams.initialisation():
        inner = build_ncsn(task.info, noise, channels=s.channels)
    model = DequantisedImages(inner, task.info).to(run.device)
    history = train(model, task.train, task.valid, s.training(s.steps, s.lr), streams)
    inverse = model.transform.inverse
    y = inner.sample(s.samples, run.stream("sample"))
    samples = {"": inverse(y), ":denoised": inverse(denoised(inner, y))}
    assert task.info.image is not None
    given, (height, width) = task.test[: s.inpainted], task.info.image
    known = (torch.arange(height).repeat_interleave(width) < height // 2).to(run.device)  # the upper half
    seen, _ = model.transform(given, run.stream("dequantise"))
    filled = [inverse(completions(inner, seen, known, run.stream(f"inpaint-{i}"))) for i in range(2)]
    others = torch.where(known, given, samples[""][torch.arange(len(given)) % s.samples])
    run.measure("nfe", Estimate.exact(inner.nfe, "network evaluations"))
    run.measure("hidden_error", hidden_error(filled[0], given, known))
    run.measure("hidden_error:unconditional", hidden_error(others, given, known))
    image_scores.judge(run, s, samples)
    drawn = {"not denoised": samples[""], "denoised": samples[":denoised"], "data": task.test}
    run.plot(sheet("samples", "Samples of annealed Langevin dynamics", drawn, task.info))
    completed = {f"completed {i + 1}": x for i, x in enumerate(filled)}
    rows = {"given": torch.where(known, given, 0.0), **completed, "true": given}
    run.plot(sheet("inpainting", "Lower halves by algorithm 2", rows, task.info))
    image_scores.plot_training(run, {"score": history})


SUBVP, VE = DiffusionSettings(sde="subvp"), DiffusionSettings(sde="ve")
SUBVP_PLAIN = DiffusionSettings(sde="subvp", weighting="plain")
NCSN_ABOUT = "NCSN with a U-Net on MNIST: annealed Langevin samples and completed lower halves"
DIFFUSIONS = (
    on_images("score-mnist-subvp", "sub-VP with a U-Net, likelihood weighting", 8, SUBVP),
    on_images("score-mnist-subvp-plain", "sub-VP under plain weighting at uniform times", 8, SUBVP_PLAIN),
    on_images("score-mnist-ve", "VE with a U-Net, likelihood weighting", 8, VE),
    on_images("ncsn-mnist", NCSN_ABOUT, 6, NCSNSettings(), annealed),
)
