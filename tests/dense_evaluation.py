"""Dense float64 evaluation of drifting, written from the paper and the release's behaviour alone.

Slow on purpose: explicit loops over problem b, row i and target j, so that each line can be read against its equation.
It shares no line with the package, and the tests hold the package against it.

    B problems, G generated x_i, P positives, N unconditional negatives, M = G + N + P targets y_j in the order
    [generated | negatives | positives], S feature dimension, w_j weight of target j, tau temperature
    d distance, s scale, u feature unit, dn distance in units of s, l logit, A affinity, c coefficient, V drift
"""

import math
from dataclasses import dataclass

import numpy as np
from dense_couplings import log_sum_exp

SELF_PAIR_DISTANCE = 100.0
SQUARED_DISTANCE_FLOOR = 1e-8
UNIT_FLOOR = 1e-3
AFFINITY_FLOOR = 1e-6
SQNORM_FLOOR = 1e-8
VARIANCE_EPSILON = 1e-6

# Each is one mistake that has been seen, or is easily made, in an implementation of the method.
MUTATIONS = (
    "no_floor",  # exact geometric mean of the two softmaxes
    "floor_after_square_root",  # max(sqrt(row col), 1e-6)
    "weight_inside_floor",  # sqrt(max(w^2 row col, 1e-6)): a pair of weight zero keeps 1e-3
    "weight_before_softmax",  # log w added to the logits of both softmaxes
    "tau_times_s",  # distances of the normalised features over tau * S, not tau * sqrt(S)
    "row_softmax_alone",
    "column_softmax_over_all_targets",  # the column softmax taken over all pairs of a problem
    "no_self_mask",
    "diagonal_excluded",  # A_ii = 0: the floor not held on the masked diagonal
    "no_self_mask_with_negatives",  # the mask is lost as soon as unconditional negatives are there
    "negatives_without_generated",  # generated samples do not repel each other
    "own_side_sum",  # positives multiplied by the positives' sum, negatives by the negatives' sum
    "opposite_direction",
    "scale_without_self_pairs",
    "no_weight_in_scale",
    "scale_not_divided_by_weights",  # mean of w d, without the division by the mean of w
    "scale_per_problem",
    "unit_without_square_root",  # u = s / S
    "unit_is_scale",  # u = s
    "statistics_per_rank",  # s and n_tau from the first half of the problems
    "sqnorm_per_problem",
    "sum_instead_of_mean",  # n_tau is the squared norm of a row, not its mean over S
    "temperatures_not_normalised",  # V = sum of V_tau, without the division by sqrt(n_tau)
    "temperatures_averaged",  # mean over temperatures, not sum
    "loss_summed_over_features",
    "one_term_centred",  # x / u against the target of centred features
)
# Floors that ordinary features never reach: seen only on tiny or coinciding points.
FLOOR_MUTATIONS = ("no_distance_floor", "no_unit_floor", "no_logit_scale_floor", "no_sqnorm_floor")


@dataclass(frozen=True)
class DenseDrift:
    """loss [B], gradient of mean(loss) [B, G, S], scale s, {tau: n_tau}, {tau: {name: value}}, {tau: V_tau [B, G, S]},
    the weighted mean of d^2, {tau: B pairs of A and c [G, M]}."""

    loss: np.ndarray
    gradient: np.ndarray
    scale: float
    sqnorm: dict
    diagnostics: dict
    drift: dict
    mean_square: float
    couplings: dict


def dense_drift(
    generated,
    positives,
    negatives,
    weights,
    temperatures,
    *,
    scale=None,
    sqnorm=None,
    mutation=None,
    mean_square=None,
    options=None,
):
    """Drift loss of one feature key: generated [B,G,S], positives [B,P,S], negatives [B,N,S], weights [B,N].

    `scale`, `mean_square` (of the distances) and `sqnorm` {tau: n_tau} replace the statistics of this batch. `mutation` makes
    one named mistake. `options` (dense_couplings.DenseOptions) replaces the method of the release's coefficients.
    """
    if mutation is not None and mutation not in MUTATIONS + FLOOR_MUTATIONS:
        raise ValueError(f"mutation is {mutation!r}; choose one of {MUTATIONS + FLOOR_MUTATIONS}")
    x = np.asarray(generated, dtype=np.float64)  # [B, G, S]
    y = np.concatenate([x, np.asarray(negatives, np.float64), np.asarray(positives, np.float64)], axis=1)  # [B, M, S]
    num_problems, num_generated, num_features = x.shape
    num_negatives, num_targets = np.shape(negatives)[1], y.shape[1]
    w = np.ones((num_problems, num_targets))  # [B, M]
    w[:, num_generated : num_generated + num_negatives] = np.asarray(weights, dtype=np.float64)
    counted = range(max(1, num_problems // 2)) if mutation == "statistics_per_rank" else range(num_problems)

    d = [_distances(x[b], y[b], mutation) for b in range(num_problems)]  # B x [G, M]
    if scale is None:
        scale = _scale(d, w, num_generated, counted, mutation)
    problem_scale = [scale] * num_problems
    if mutation == "scale_per_problem":
        problem_scale = [_scale(d, w, num_generated, [b], mutation) for b in range(num_problems)]

    if mean_square is None:
        weighing = "no_weight_in_scale" if getattr(options, "mutation", None) == "square_of_unweighted_mean" else None
        mean_square = _scale([value**2 for value in d], w, num_generated, counted, weighing)
    if getattr(options, "mutation", None) == "square_unit":
        problem_scale = [math.sqrt(mean_square)] * num_problems

    drift = {float(tau): np.zeros_like(x) for tau in temperatures}  # V_tau [B, G, S]
    parts = {tau: [] for tau in drift}
    unit = [_unit(problem_scale[b], num_features, mutation) for b in range(num_problems)]
    for tau in drift:
        for b in range(num_problems):
            if options is None:
                affinity, on_floor = _affinity(
                    d[b], w[b], tau, problem_scale[b], num_generated, num_negatives, num_features, mutation
                )
                coefficient = _coefficients(affinity, num_generated, num_negatives, mutation)
            else:
                affinity, coefficient, on_floor = options.coefficients(
                    d[b], w[b], tau, scale, mean_square, num_generated, num_generated + num_negatives
                )
            for i in range(num_generated):
                for j in range(num_targets):  # 1.5: V_tau,i = sum_j c_ij y~_j - (sum_j c_ij) x~_i
                    drift[tau][b, i] += coefficient[i, j] * (y[b, j] - x[b, i]) / unit[b]
            parts[tau].append((affinity, coefficient, on_floor))

    measured = {tau: _mean_square(drift[tau], counted, mutation) for tau in drift}  # 1.6
    sqnorm = measured if sqnorm is None else {float(tau): float(value) for tau, value in sqnorm.items()}
    loss, gradient = np.zeros(num_problems), np.zeros_like(x)
    for b in range(num_problems):
        total = np.zeros_like(x[b])  # V [G, S]
        for tau in drift:
            n = _mean_square(drift[tau], [b], mutation) if mutation == "sqnorm_per_problem" else sqnorm[tau]
            total += drift[tau][b] / _norm(n, mutation)
        if mutation == "temperatures_averaged":
            total /= len(drift)
        centre = y[b].mean(axis=0) if mutation == "one_term_centred" else 0.0
        difference = centre / unit[b] - total  # 1.7: x/u - sg(x~ + V); the gradient flows through the first term alone
        square = difference**2
        loss[b] = square.sum() if mutation == "loss_summed_over_features" else square.mean()
        if options is not None and options.field == "per_temperature":  # one loss a temperature; the same gradient
            loss[b] = sum(((drift[tau][b] / _norm(sqnorm[tau], None)) ** 2).mean() for tau in drift)
            loss[b] /= len(drift) if options.mutation == "temperatures_averaged" else 1
        count = num_generated * (1 if mutation == "loss_summed_over_features" else num_features)
        gradient[b] = 2.0 * difference / (count * unit[b]) / num_problems
    diagnostics = {tau: _diagnostics(parts[tau], num_generated, num_negatives) for tau in drift}
    couplings = {tau: [(affinity, c) for affinity, c, _ in parts[tau]] for tau in drift}
    return DenseDrift(loss, gradient, float(scale), sqnorm, diagnostics, drift, float(mean_square), couplings)


def _distances(x, y, mutation):
    """1.1: d_ij = sqrt(max(|x_i - y_j|^2, 1e-8)), [G, M]."""
    floor = 0.0 if mutation == "no_distance_floor" else SQUARED_DISTANCE_FLOOR
    d = np.zeros((len(x), len(y)))
    for i in range(len(x)):
        for j in range(len(y)):
            difference = x[i] - y[j]
            d[i, j] = math.sqrt(max(float(difference @ difference), floor))
    return d


def _scale(d, w, num_generated, problems, mutation):
    """1.2: s = mean_bij(w_bj d_bij) / mean_bj(w_bj) over the problems, self pairs included."""
    weighted, total_weight, num_pairs = 0.0, 0.0, 0
    for b in problems:
        for i in range(num_generated):
            for j in range(w.shape[1]):
                if mutation == "scale_without_self_pairs" and i == j:
                    continue
                weight = 1.0 if mutation == "no_weight_in_scale" else w[b, j]
                weighted += weight * d[b][i, j]
                total_weight += weight  # every row sees the same weights: the mean over bij is the mean over bj
                num_pairs += 1
    if mutation == "scale_not_divided_by_weights":
        return weighted / num_pairs
    return weighted / total_weight


def _unit(scale, num_features, mutation):
    """1.3: u = max(s / sqrt(S), 1e-3)."""
    divisor = {"unit_without_square_root": num_features, "unit_is_scale": 1.0}.get(mutation, math.sqrt(num_features))
    return max(scale / divisor, 1e-30 if mutation == "no_unit_floor" else UNIT_FLOOR)


def _affinity(d, w, tau, scale, num_generated, num_negatives, num_features, mutation):
    """1.3 and 1.4: A [G, M], and where row * col is below the floor [G, M]."""
    num_targets = d.shape[1]
    masked = not (mutation == "no_self_mask" or (mutation == "no_self_mask_with_negatives" and num_negatives > 0))
    l = np.zeros_like(d)
    for i in range(num_generated):
        for j in range(num_targets):
            dn = d[i, j] / max(scale, 1e-30 if mutation == "no_logit_scale_floor" else UNIT_FLOOR)
            if mutation == "tau_times_s":  # d / u / (tau S) = dn / (tau sqrt(S))
                dn /= math.sqrt(num_features)
            if masked and i == j:
                dn += SELF_PAIR_DISTANCE
            l[i, j] = -dn / tau
            if mutation == "weight_before_softmax":
                l[i, j] += math.log(w[j]) if w[j] > 0 else -1e30
    lse_row = [log_sum_exp(l[i, :]) for i in range(num_generated)]
    lse_col = [log_sum_exp(l[:, j]) for j in range(num_targets)]
    if mutation == "column_softmax_over_all_targets":
        lse_col = [log_sum_exp(l.ravel())] * num_targets
    affinity, on_floor = np.zeros_like(d), np.zeros(d.shape, dtype=bool)
    for i in range(num_generated):
        for j in range(num_targets):
            row = math.exp(max(l[i, j] - lse_row[i], -700.0))
            col = math.exp(max(l[i, j] - lse_col[j], -700.0))
            product = row * row if mutation == "row_softmax_alone" else row * col
            on_floor[i, j] = product < AFFINITY_FLOOR
            if mutation == "diagonal_excluded" and i == j:
                affinity[i, j] = 0.0
            elif mutation == "no_floor":
                affinity[i, j] = w[j] * math.sqrt(product)
            elif mutation == "floor_after_square_root":
                affinity[i, j] = w[j] * max(math.sqrt(product), AFFINITY_FLOOR)
            elif mutation == "weight_inside_floor":
                affinity[i, j] = math.sqrt(max(w[j] ** 2 * product, AFFINITY_FLOOR))
            elif mutation == "weight_before_softmax":
                affinity[i, j] = math.sqrt(max(product, AFFINITY_FLOOR)) if w[j] > 0 else 0.0
            else:  # A_ij = w_j sqrt(max(row_ij col_ij, 1e-6))
                affinity[i, j] = w[j] * math.sqrt(max(product, AFFINITY_FLOOR))
    return affinity, on_floor


def _coefficients(affinity, num_generated, num_negatives, mutation):
    """1.5: c_ij = A_ij sum_neg A_i. for positives, -A_ij sum_pos A_i. for negatives (generated and unconditional)."""
    num_repelling = num_generated + num_negatives
    first = num_generated if mutation == "negatives_without_generated" else 0
    c = np.zeros_like(affinity)
    for i in range(num_generated):
        sum_negative = sum(affinity[i, first:num_repelling])
        sum_positive = sum(affinity[i, num_repelling:])
        if mutation == "own_side_sum":
            sum_negative, sum_positive = sum_positive, sum_negative
        for j in range(first, affinity.shape[1]):
            c[i, j] = affinity[i, j] * sum_negative if j >= num_repelling else -affinity[i, j] * sum_positive
    return -c if mutation == "opposite_direction" else c


def _mean_square(drift, problems, mutation):
    """1.6: n_tau = mean over problems, rows and S of V_tau^2."""
    values = [float((drift[b, i] ** 2).sum()) for b in problems for i in range(drift.shape[1])]
    rows = sum(values) / len(values)
    return rows if mutation == "sum_instead_of_mean" else rows / drift.shape[2]


def _norm(n, mutation):
    """1.6: sqrt(max(n_tau, 1e-8)), what V_tau is divided by."""
    if mutation == "temperatures_not_normalised":
        return 1.0
    return math.sqrt(max(n, 1e-30 if mutation == "no_sqnorm_floor" else SQNORM_FLOOR))


def _diagnostics(parts, num_generated, num_negatives):
    """Of one temperature, over all problems: how the coupling spreads.

    floor_share: share of pairs [B, G, M] below the floor; *_sample_size: mean over rows of (sum A)^2 / sum A^2 over the
    positives, over the negatives (generated and unconditional); mean_coefficient: mean of |c_ij|.
    """
    num_repelling = num_generated + num_negatives
    floor, coefficient, positive, negative = [], [], [], []
    for affinity, c, on_floor in parts:
        for i in range(num_generated):
            floor.extend(bool(value) for value in on_floor[i])
            coefficient.extend(abs(float(value)) for value in c[i])
            positive.append(_sample_size(affinity[i, num_repelling:]))
            negative.append(_sample_size(affinity[i, :num_repelling]))
    return {
        "floor_share": float(np.mean(floor)),
        "positive_sample_size": float(np.mean(positive)),
        "negative_sample_size": float(np.mean(negative)),
        "mean_coefficient": float(np.mean(coefficient)),
    }


def _sample_size(weights):
    weights = weights / max(weights.max(), 1e-300)  # the squares of tiny ones are not lost
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0


def dense_features(maps, encoder_input=None, windows=(2, 4)):
    """Keys of the pooled statistics of {name: [B,C,H,W] or [B,T,S]}: {key: [B, locations, channels]}, and `norm_x`."""
    features = {}
    if encoder_input is not None:
        grid = np.asarray(encoder_input, dtype=np.float64)
        features["norm_x"] = np.sqrt((grid**2).mean(axis=(2, 3)) + VARIANCE_EPSILON)[:, None, :]
    for name, value in maps.items():
        value = np.asarray(value, dtype=np.float64)
        spatial = value.ndim == 4
        vectors = value.reshape(*value.shape[:2], -1).transpose(0, 2, 1) if spatial else value  # [B, T, S], row-major
        features[name] = vectors
        features[f"{name}_mean"], features[f"{name}_std"] = (s[:, None, :] for s in _mean_and_std(vectors))
        for size in windows:
            if not spatial or value.shape[2] % size or value.shape[3] % size:
                continue
            means, stds = [], []
            for top in range(0, value.shape[2], size):
                for left in range(0, value.shape[3], size):
                    window = value[:, :, top : top + size, left : left + size]
                    mean, std = _mean_and_std(window.reshape(*value.shape[:2], -1).transpose(0, 2, 1))
                    means.append(mean)
                    stds.append(std)
            features[f"{name}_mean_{size}"] = np.stack(means, axis=1)
            features[f"{name}_std_{size}"] = np.stack(stds, axis=1)
    return features


def _mean_and_std(vectors):
    """[B, T, S] -> mean [B, S] and sqrt(biased variance + 1e-6) [B, S] over T."""
    mean = vectors.mean(axis=1)
    variance = ((vectors - mean[:, None, :]) ** 2).mean(axis=1)
    return mean, np.sqrt(variance + VARIANCE_EPSILON)


def dense_guidance(uniform_scale, uniform_skip, minimum, maximum, power, fraction):
    """Guidance by inverse CDF of the density a^-power on [minimum, maximum], then 1 where uniform_skip < fraction."""
    draws = []
    for u, skip in zip(np.ravel(uniform_scale), np.ravel(uniform_skip), strict=True):
        if power == 1:
            a = math.exp(math.log(minimum) + float(u) * (math.log(maximum) - math.log(minimum)))
        else:
            q = 1.0 - power
            a = (minimum**q + float(u) * (maximum**q - minimum**q)) ** (1.0 / q)
        draws.append(1.0 if skip < fraction else a)
    return np.array(draws, dtype=np.float64).reshape(np.shape(uniform_scale))


def dense_negative_weight(guidance_scale, num_generated, num_negatives):
    """w = (a - 1)(G - 1) / N."""
    return (np.asarray(guidance_scale, dtype=np.float64) - 1.0) * (num_generated - 1) / num_negatives


def assert_close(name, actual, expected, *, relative, absolute=0.0, normwise=False):
    """Elementwise |actual - expected| <= absolute + relative |expected|, or the same of the norms of whole arrays."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {actual.shape}, expected {expected.shape}")
    difference, size = np.abs(actual - expected), np.abs(expected)
    if normwise:
        difference, size = np.linalg.norm(difference.ravel()), np.linalg.norm(size.ravel())
    if not np.all(difference <= absolute + relative * size):  # written so that NaN fails
        pointwise = np.abs(actual - expected)
        kind = "norm-wise" if normwise else "elementwise"
        raise AssertionError(
            f"{name}: largest difference {pointwise.max():.3e}, mean {pointwise.mean():.3e}, largest expected value "
            f"{np.abs(expected).max():.3e}; {kind} relative {relative_difference(actual, expected, normwise):.3e}, "
            f"limit {relative:.1e} relative + {absolute:.1e} absolute"
        )


def relative_difference(actual, expected, normwise=False):
    """Largest relative difference of the elements, or the relative norm of the difference."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if normwise:
        return float(np.linalg.norm((actual - expected).ravel()) / max(np.linalg.norm(expected.ravel()), 1e-300))
    return float((np.abs(actual - expected) / np.maximum(np.abs(expected), 1e-300)).max(initial=0.0))
