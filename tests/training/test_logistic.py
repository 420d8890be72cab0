"""The logistic regression that routers start from, and its word on steps it has not seen."""

import pytest
import torch

from layerroute.training.logistic import fit_logistic


def classes(rows, apart, seed=0):
    """Two classes of unequal size, `apart` standard deviations from each other in one of 40 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(rows) < rows // 4, 1.0, -1.0)
    x = torch.randn(rows, 40, generator=generator)
    x[:, 0] += apart * (y > 0)
    return x, y


def test_it_separates_classes_of_unequal_size():
    x, y = classes(120, 8.0)
    fit = fit_logistic(x, y)
    assert torch.equal((x @ fit.weight + fit.bias) > 0, y > 0)


@pytest.mark.parametrize("rows", [60, 30])  # more examples than dimensions, and fewer
def test_a_left_out_score_is_that_of_a_fit_without_the_example(rows):
    x, y = classes(rows, 2.0)
    fit = fit_logistic(x, y)
    error, seen = [], []
    for i in range(rows):
        keep = torch.arange(rows) != i
        without = fit_logistic(x[keep], y[keep])
        error.append(float(x[i] @ without.weight + without.bias - fit.left_out[i]))
        seen.append(float(x[i] @ fit.weight + fit.bias - fit.left_out[i]))
    error, seen = torch.tensor(error).abs(), torch.tensor(seen).abs()
    assert error.median() < 0.3 * seen.median()  # far nearer than the score of the fit that has seen it


def test_the_scale_of_the_examples_does_not_matter():
    x, y = classes(60, 2.0)
    one, other = fit_logistic(x, y), fit_logistic(x * 1000.0, y)
    assert torch.allclose(one.left_out, other.left_out, atol=1e-4)
    assert torch.allclose(one.weight, other.weight * 1000.0, atol=1e-4)


def test_left_out_scores_are_one_in_size():
    for apart in (0.5, 2.0, 20.0):
        x, y = classes(200, apart)
        left_out = fit_logistic(x, y).left_out.abs()
        assert abs(float((left_out[y > 0].mean() + left_out[y < 0].mean()) / 2) - 1) < 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-5, 1.0])
def test_examples_that_are_all_the_same_get_one_score(value):
    x = torch.zeros(20, 8)
    x[:, 0] = value
    fit = fit_logistic(x, torch.where(torch.arange(20) < 10, 1.0, -1.0))
    score = x @ fit.weight + fit.bias
    assert bool(fit.left_out.isfinite().all())
    assert float((score - score[0]).abs().max()) == 0.0


def test_a_dimension_that_is_always_zero_changes_nothing():
    x, y = classes(60, 2.0)
    wider = torch.cat([x, torch.zeros(60, 3)], dim=1)
    assert torch.allclose(fit_logistic(x, y).left_out, fit_logistic(wider, y).left_out, atol=1e-4)
