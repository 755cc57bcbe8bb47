"""Inception score of class logits (Salimans et al. 2016), with the permutation and splits of the usual evaluation code."""

import numpy as np
import torch
from scipy.special import log_softmax

# Fixed by the evaluation protocol: the score depends on how the images are dealt to the splits.
PERMUTATION_SEED = 2020


def inception_score(logits: np.ndarray | torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and population standard deviation over splits of exp(mean KL(p(y|x) || p(y))).

    logits [N, classes], before the softmax. Rows are permuted by numpy RandomState(2020), then cut into `splits` parts
    that differ by at most one row; p(y) is the mean of its part. Computed in float64. Raises ValueError for a wrong
    shape, a non-finite logit, and fewer rows than splits. Source: arXiv 1606.03498.
    """
    if isinstance(logits, torch.Tensor):
        logits = logits.detach().double().cpu().numpy()
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape [N, classes], got {list(logits.shape)}; pass one row an image")
    num_rows = logits.shape[0]
    if not 1 <= splits <= num_rows:
        raise ValueError(f"splits must lie between 1 and the number of rows {num_rows}, got {splits}; pass more logits")
    if not np.isfinite(logits).all():
        raise ValueError("logits hold a NaN or an infinite value; check the classifier and the images it was given")

    log_probabilities = log_softmax(logits, axis=1)[np.random.RandomState(PERMUTATION_SEED).permutation(num_rows)]
    scores = []
    for split in range(splits):
        part = log_probabilities[split * num_rows // splits : (split + 1) * num_rows // splits]
        probabilities = np.exp(part)
        marginal = probabilities.mean(axis=0)
        # A class that underflows to zero in every row adds nothing to the divergence; its logarithm must not be taken.
        log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        divergence = (probabilities * (part - log_marginal)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))
