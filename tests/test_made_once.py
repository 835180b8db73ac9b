"""What tests make once: found again by its values, never for others, and each test's own to change."""

from __future__ import annotations

import pytest
import torch

from .conftest import made_once, small_vit


@pytest.fixture
def doubled():
    """A model as it is made once, and how often it was."""
    made = []

    @made_once
    def double(model, by=2):
        made.append(by)
        with torch.no_grad():
            model.norm.weight.mul_(by)
        return model, torch.randn(3)

    return double, made


def fresh(seed):
    torch.manual_seed(seed)
    return small_vit(depth=1)


def test_equal_values_are_made_once(seed, doubled):
    """Models made in turn lie elsewhere in memory, which torch's pickles tell: every call made anew."""
    double, made = doubled
    (one, noise), after = double(fresh(seed)), torch.randn(3)
    with torch.no_grad():
        one.norm.weight.zero_()
    (two, same), again = double(fresh(seed)), torch.randn(3)
    assert made == [2]
    assert torch.equal(same, noise)
    assert torch.equal(again, after)
    assert torch.equal(two.norm.weight, 2 * fresh(seed).norm.weight)


def test_other_values_are_made_anew(seed, doubled):
    double, made = doubled
    double(fresh(seed))
    changed = fresh(seed)
    changed.head.bias.data[3] += 1e-3
    double(changed)
    wanted = fresh(seed)
    wanted.head.bias.requires_grad_(False)
    double(wanted)
    model = fresh(seed)
    torch.manual_seed(seed + 1)
    double(model)
    double(fresh(seed), by=3)
    assert made == [2, 2, 2, 2, 3]


def test_the_latest_are_kept():
    made = []
    make = made_once(made.append, most=2)
    for value in (1, 2, 1, 3, 2, 1):
        make(value)
    assert made == [1, 2, 3, 1]
