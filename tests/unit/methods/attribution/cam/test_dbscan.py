"""Clusters of density against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import DBSCAN

from patchclamp.methods.attribution.cam.cf_cam import NOISE, cosine_distances, dbscan


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("radius", "min_points"), [(0.1, 2), (0.25, 3), (0.5, 8), (1.0, 4)])
def test_same_clusters_as_scikit_learn(seed: int, radius: float, min_points: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 2, generator=generator)
    x = centres.repeat(16, 1) + 0.2 * torch.randn(80, 2, generator=generator)
    distances = torch.cdist(x, x).fill_diagonal_(0)
    expected = DBSCAN(eps=radius, min_samples=min_points, metric="precomputed").fit(distances)
    assert dbscan(distances, radius, min_points).tolist() == expected.labels_.tolist()


def test_lonely_points_are_noise() -> None:
    assert dbscan(torch.ones(4, 4).fill_diagonal_(0), 0.5, 2).tolist() == [NOISE] * 4
    assert dbscan(torch.ones(4, 4).fill_diagonal_(0), 0.5, 1).tolist() == [0, 1, 2, 3]


def test_cosine_distances() -> None:
    made = cosine_distances(torch.tensor([[1.0, 0], [2, 0], [0, 1], [-1, 0], [0, 0]]))
    expected = [[0, 0, 1, 2, 1], [0, 0, 1, 2, 1], [1, 1, 0, 1, 1], [2, 2, 1, 0, 1], [1, 1, 1, 1, 0]]
    assert made.tolist() == expected
