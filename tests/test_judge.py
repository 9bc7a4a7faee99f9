"""The figures of judge.py, where they can be known without a face recogniser."""

import judge
import numpy as np
import pytest


def test_frechet_distance_of_gaussians():
    one = np.random.default_rng(0).standard_normal((50_000, 3))
    assert judge.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert judge.frechet_distance(one, one + [1, 2, 3]) == pytest.approx(14, abs=1e-9)
    other = np.random.default_rng(1).standard_normal((50_000, 3)) * [1, 2, 5]  # the sum of the (sigma - sigma')^2
    assert judge.frechet_distance(one, other) == pytest.approx(0 + 1 + 16, rel=0.02)


def test_pictures_without_a_face_do_not_count():
    found = np.array([[[3.0, 4.0]], [[np.nan, np.nan]], [[6.0, 8.0]]])
    assert judge.share_found(found) == pytest.approx(100 * 2 / 3)
    assert judge.distance(found, np.zeros((3, 1, 2))) == pytest.approx(7.5)
    people = np.random.default_rng(0).standard_normal((100, 2))
    assert judge.frechet_distance(np.concatenate([people, found[1]]), people) == pytest.approx(0, abs=1e-9)
