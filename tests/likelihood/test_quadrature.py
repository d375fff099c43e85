"""log Z by quadrature against closed forms, and its stated error against its true error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from replicate.likelihood import quadrature
from replicate.likelihood.quadrature import grid, log_z


def anisotropic_gaussian(x: Tensor) -> Tensor:
    """Unnormalised, widths 0.7 and 1.3, log Z = log(2 pi 0.7 1.3) + 5."""
    return 5 - 0.5 * (x / torch.tensor([0.7, 1.3], dtype=x.dtype)).square().sum(-1)


def test_the_grid_fills_the_box_with_cells_of_equal_volume() -> None:
    nodes, log_cell = grid(3.0, 4, 2)
    assert nodes.shape == (16, 2)
    assert 16 * math.exp(log_cell) == pytest.approx(6.0**2)
    torch.testing.assert_close(nodes[:5, 1], torch.tensor([-2.25, -0.75, 0.75, 2.25, -2.25]))
    torch.testing.assert_close(nodes[::4, 0], torch.tensor([-2.25, -0.75, 0.75, 2.25]))
    assert grid(3.0, 4, 1)[0].shape == (4, 1)


def test_a_gaussian_integrates_to_its_closed_form() -> None:
    z = log_z(anisotropic_gaussian, 12.0, points=200, dtype=torch.float64)
    assert z.value == pytest.approx(math.log(2 * math.pi * 0.7 * 1.3) + 5, abs=1e-12)
    assert (z.kind, z.unit, z.n) == ("estimate", "nats", 200**2)


def test_one_dimension_gives_the_laplace_distribution() -> None:
    z = log_z(lambda x: -x.abs().squeeze(-1), 40.0, points=20_000, dim=1, dtype=torch.float64)
    assert z.value == pytest.approx(math.log(2), abs=1e-5)


def test_at_a_discontinuity_the_error_falls_like_the_spacing() -> None:
    disc = lambda x: torch.where(x.square().sum(-1) < 1, 0.0, -math.inf)  # noqa: E731
    for points in (30, 50, 100, 400):
        z = log_z(disc, 1.5, points=points)
        assert 0 < abs(z.value - math.log(math.pi)) < min(3 / points, 3 * z.stderr)


def test_discontinuities_along_cell_borders_cost_nothing() -> None:
    square = lambda x: torch.where(x.abs().amax(-1) < 1, 0.0, -math.inf)  # noqa: E731
    assert log_z(square, 2.0, points=40).value == pytest.approx(math.log(4), abs=1e-12)


def test_the_stated_error_of_a_smooth_function_is_no_smaller_than_the_true_one() -> None:
    z = log_z(anisotropic_gaussian, 12.0, points=24, dtype=torch.float64)
    assert 1e-9 < abs(z.value - math.log(2 * math.pi * 0.7 * 1.3) - 5) <= z.stderr


def test_the_stated_error_is_the_difference_to_half_the_resolution() -> None:
    fine, coarse = (log_z(anisotropic_gaussian, 12.0, points=points, dtype=torch.float64) for points in (20, 10))
    assert fine.stderr == pytest.approx(abs(fine.value - coarse.value), rel=1e-12)
    assert fine.stderr > 1e-6


def test_single_precision_functions_are_summed_in_double_precision() -> None:
    z = log_z(anisotropic_gaussian, 12.0, points=400)
    assert z.value == pytest.approx(math.log(2 * math.pi * 0.7 * 1.3) + 5, abs=1e-6)


def test_chunks_do_not_change_the_integral(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return anisotropic_gaussian(x)

    whole = log_z(anisotropic_gaussian, 8.0, points=30)
    monkeypatch.setattr(quadrature, "CHUNK", 97)
    parts = log_z(watched, 8.0, points=30)
    assert max(seen) == 97
    assert parts.value == pytest.approx(whole.value, abs=1e-12)


@pytest.mark.parametrize(("half_width", "points", "dim"), [(1.0, 10, 3), (0.0, 10, 2), (1.0, 0, 2), (1.0, 1, 2)])
def test_settings_without_an_integral_are_refused(half_width: float, points: int, dim: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        log_z(anisotropic_gaussian, half_width, points, dim)
