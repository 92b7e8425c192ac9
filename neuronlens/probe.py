"""A linear probe as a measure of salience: how heavily does the best linear reader of a layer lean on each neuron?

Multinomial logistic regression on the standardized values, a class a concept, with scikit-learn's own settings (L2,
C = 1). A neuron's score under a concept is the size of its weight for that class: unlike the other methods it sees all
neurons together, so that of two neurons that say the same each gets half (Alain and Bengio 2016; Dalvi et al. 2019).
"""

from dataclasses import dataclass

import numpy as np

from neuronlens.errors import UsageError

HELD_OUT = 5
"""Every fifth text is kept from the probe, to see how well it reads what it has not seen."""
_MAX_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A trained probe. concepts: sorted; score_CN: float64 [C, N], the size of the weights on standardized values, 0
    for a neuron that never varies; accuracy: share of the held-out rows read right, NaN where none was held out."""

    concepts: tuple[str, ...]
    score_CN: np.ndarray
    accuracy: float
    n_rows: int


def train_probe(x_RN: np.ndarray, concept_R: np.ndarray, sample_R: np.ndarray) -> Probe:
    """Train on the rows of x_RN (float32; a value that is not finite counts as the neuron's mean).

    Rows of one text are held out together. Raises UsageError for fewer than two concepts, and without scikit-learn.
    """
    concepts = tuple(sorted(set(concept_R.tolist())))
    if len(concepts) < 2:
        raise UsageError(
            f"A linear probe tells concepts apart, and there is only {', '.join(concepts) or 'none'}. Expected two or "
            "more; take another method of salience."
        )
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError("A linear probe needs scikit-learn: pip install 'neuronlens[probe]'") from error
    held_out_R = sample_R % HELD_OUT == HELD_OUT - 1
    if set(concept_R[~held_out_R].tolist()) != set(concepts):
        held_out_R = np.zeros(len(x_RN), bool)
    z_RN = _standardized(x_RN, ~held_out_R)
    reader = LogisticRegression(max_iter=_MAX_STEPS).fit(z_RN[~held_out_R], concept_R[~held_out_R])
    weight_CN = np.abs(reader.coef_)
    if len(concepts) == 2:  # one weight serves both classes
        weight_CN = np.repeat(weight_CN, 2, axis=0)
    accuracy = float(reader.score(z_RN[held_out_R], concept_R[held_out_R])) if held_out_R.any() else float("nan")
    return Probe(concepts=concepts, score_CN=weight_CN, accuracy=accuracy, n_rows=len(x_RN))


def _standardized(x_RN: np.ndarray, is_train_R: np.ndarray) -> np.ndarray:
    """Mean 0 and std 1 over the training rows; 0 for what does not vary or is not finite. float32."""
    x = np.where(np.isfinite(x_RN), x_RN, np.nan)
    with np.errstate(all="ignore"):
        mean_N = np.nanmean(x[is_train_R], axis=0, dtype=np.float64)
        std_N = np.nanstd(x[is_train_R], axis=0, dtype=np.float64)
        z = (x - mean_N) / std_N
    return np.where(np.isfinite(z) & (std_N > 0), z, 0).astype(np.float32)
