"""neuronlens/probe.py against a logistic regression written out here and solved by scipy."""

import sys

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from neuronlens.errors import UsageError
from neuronlens.probe import HELD_OUT, train_probe


def _rows(rng: np.random.Generator, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three concepts: neuron 0 tells a from the rest, 1 tells b, 2 is noise, 3 is constant, 4 repeats 0."""
    concept_R = rng.choice(["a", "b", "c"], n)
    x = rng.normal(size=(n, 5)) * [1, 20, 1, 0, 1] + [5, -3, 0, 7, 0]
    x[:, 0] += 3 * (concept_R == "a")
    x[:, 1] += 50 * (concept_R == "b")
    x[:, 4] = x[:, 0]
    return x.astype(np.float32), concept_R, np.arange(n)


def _weights(x_RN: np.ndarray, concept_R: np.ndarray) -> np.ndarray:
    """Softmax regression with an L2 penalty of 1/2 on the weights, none on the intercepts: [C, N]."""
    std = x_RN.std(axis=0, dtype=np.float64)
    z = np.where(std > 0, (x_RN - x_RN.mean(axis=0, dtype=np.float64)) / np.where(std > 0, std, 1), 0)
    names = sorted(set(concept_R))
    y = np.array([names.index(concept) for concept in concept_R])
    shape = (len(names), z.shape[1] + 1)

    def loss(flat: np.ndarray) -> float:
        w = flat.reshape(shape)
        logits = z @ w[:, :-1].T + w[:, -1]
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum() + (w[:, :-1] ** 2).sum() / 2)

    found = minimize(loss, np.zeros(shape).ravel(), method="BFGS", options={"gtol": 1e-3, "maxiter": 2000})
    return np.abs(found.x.reshape(shape)[:, :-1])


def test_train_probe__finds_the_weights_of_a_logistic_regression():
    x_RN, concept_R, sample_R = _rows(np.random.default_rng(0))
    probe = train_probe(x_RN, concept_R, sample_R)
    is_train = sample_R % HELD_OUT != HELD_OUT - 1
    expected_CN = _weights(x_RN[is_train], concept_R[is_train])
    np.testing.assert_allclose(probe.score_CN, expected_CN, rtol=0.02, atol=0.01)
    assert probe.concepts == ("a", "b", "c")
    assert probe.score_CN[0].argmax() in (0, 4)
    assert probe.score_CN[1].argmax() == 1
    assert (probe.score_CN[:, 3] == 0).all()
    np.testing.assert_allclose(probe.score_CN[:, 0], probe.score_CN[:, 4], rtol=1e-3)


def test_train_probe__is_judged_on_texts_that_it_has_not_seen():
    """Every text has two rows that are the same noise: a probe that saw one of them would know the other."""
    rng = np.random.default_rng(1)
    x_TN, concept_T = rng.normal(size=(60, 50)).astype(np.float32), rng.choice(["a", "b"], 60)
    probe = train_probe(np.repeat(x_TN, 2, axis=0), np.repeat(concept_T, 2), np.repeat(np.arange(60), 2))
    assert probe.accuracy < 0.8
    assert probe.n_rows == 120


def test_train_probe__two_concepts_share_their_weights():
    x_RN, concept_R, sample_R = _rows(np.random.default_rng(2))
    kept = concept_R != "c"
    probe = train_probe(x_RN[kept], concept_R[kept], sample_R[kept])
    assert probe.score_CN.shape == (2, 5)
    np.testing.assert_array_equal(probe.score_CN[0], probe.score_CN[1])


def test_train_probe__reads_past_values_that_are_not_finite():
    x_RN, concept_R, sample_R = _rows(np.random.default_rng(3))
    x_RN[::7, 2] = np.nan
    x_RN[3, 0] = np.inf
    probe = train_probe(x_RN, concept_R, sample_R)
    assert np.isfinite(probe.score_CN).all()
    assert probe.accuracy > 0.8


def test_train_probe__needs_two_concepts():
    with pytest.raises(UsageError, match="only a"):
        train_probe(np.zeros((4, 2), np.float32), np.array(["a"] * 4), np.arange(4))


def test_train_probe__names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match=r"pip install 'neuronlens\[probe\]'"):
        train_probe(*_rows(np.random.default_rng(4)))
