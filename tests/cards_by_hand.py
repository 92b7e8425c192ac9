"""Cards of a neuron from the values themselves, by no code of the library."""

from typing import Any

import numpy as np

from neuronlens.cards import Bump, Card, Histogram
from tests.synthetic_store import bin_span, bins_of

NOTHING: dict[str, Any] = {"rank": None, "nearest": None, "nearest_ovl": None, "row": {}}


def histogram_of(x: np.ndarray) -> Histogram:
    """Straight from the bins of docs/store-format.md, drawn in to min and max."""
    bins = sorted(bins_of(x).items())
    spans = np.array([bin_span(b) for b, _ in bins]).clip(x.min(), x.max())
    counts = np.array([n for _, n in bins], float)
    return Histogram(lower_K=spans[:, 0], upper_K=spans[:, 1], share_K=counts / counts.sum())


def bump_of(x: np.ndarray, concept: str = "joy", tau: float = 2.5, *, histogram: bool = True, **more) -> Bump:
    mean, std = float(x.mean(dtype=float)), float(x.std(dtype=float))
    return Bump(
        concept=concept,
        n=len(x),
        mean=mean,
        std=std,
        lower=mean - tau * std,
        upper=mean + tau * std,
        min=float(x.min()),
        max=float(x.max()),
        histogram=histogram_of(x) if histogram else None,
        **{**NOTHING, **more},
    )


def card_of(*bumps: Bump, tau: float = 2.5) -> Card:
    return Card(hook_point="mlp_post", layer=3, neuron=7, tau=tau, bumps=bumps, n_concepts=len(bumps))


def joy_and_law() -> Card:
    """Two bumps apart, an eighth in common."""
    rng = np.random.default_rng(2)
    joy, law = rng.normal(0, 1, 500).astype(np.float32), rng.normal(6, 2, 500).astype(np.float32)
    return card_of(
        bump_of(joy, "joy", nearest="law", nearest_ovl=0.125), bump_of(law, "law", nearest="joy", nearest_ovl=0.125)
    )
