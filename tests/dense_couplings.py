"""Dense float64 evaluation of the drift's options, written from their definitions alone; see dense_evaluation.py.

`DenseOptions` turns the distances [G, M] of one problem into its coefficients c [G, M], by loops over row i and target j.
The options have the names they have in a run's configuration; nothing of the package is imported.
"""

import math
from dataclasses import dataclass

import numpy as np

SELF_PAIR_DISTANCE = 100.0
SCALE_FLOOR = 1e-3
COLUMN_WEIGHT_FLOOR = 1e-6
ROW_SUM_FLOOR = 1e-12

PRESETS = {
    "official": {},
    "paper": {"affinity_floor": 0.0, "reduction": "paper"},
    "sinkhorn_drift": {"affinity_floor": 0.0, "weight_placement": "log_bias"},
}

# Each is one mistake in one option, with a choice of options that shows it.
OPTION_MUTATIONS = {
    "weight_twice": {"weight_placement": "log_bias"},  # in the logits and again as a factor
    "absent_target_keeps_floor": {"weight_placement": "log_bias"},  # w = 0: sqrt(floor) instead of 0
    "absent_target_keeps_share": {"weight_placement": "log_bias"},  # w = 0: counted in the row softmax's sum
    "floor_of_default": {"affinity_floor": 1e-3},
    "floor_under_row": {"coupling": "row", "affinity_floor": 1e-3},
    "floor_under_sinkhorn": {"coupling": "sinkhorn", "affinity_floor": 1e-3},
    "root_of_row": {"coupling": "row"},
    "row_after_in_logits": {"coupling": "row"},  # log w in the logits although the placement is `after`
    "row_bias_as_factor": {"coupling": "row", "weight_placement": "log_bias"},
    "sinkhorn_columns_first": {"coupling": "sinkhorn", "sinkhorn_iterations": 3},
    "sinkhorn_one_update_less": {"coupling": "sinkhorn", "sinkhorn_iterations": 2},
    "sinkhorn_mass_of_one": {"coupling": "sinkhorn"},  # the plan itself, not G times it
    "sinkhorn_ends_on_rows": {"coupling": "sinkhorn", "sinkhorn_iterations": 2},  # one more update of the rows
    "sinkhorn_unweighted_columns": {"coupling": "sinkhorn"},
    "sinkhorn_weight_as_factor": {"coupling": "sinkhorn"},  # columns of mass w, and the factor w again
    "sinkhorn_none_without_bias": {"coupling": "sinkhorn", "sinkhorn_marginal": "none", "sinkhorn_iterations": 1},
    "sinkhorn_none_with_factor": {"coupling": "sinkhorn", "sinkhorn_marginal": "none", "sinkhorn_iterations": 1},
    "square_over_squared_scale": {"metric": "l2_sq"},  # d^2 / s^2
    "square_of_unweighted_mean": {"metric": "l2_sq"},
    "square_masked_before_scaling": {"metric": "l2_sq"},  # (d^2 + 100) / mean d^2
    "square_unit": {"metric": "l2_sq"},  # features divided by the root of the mean square
    "self_masked": {"mask_self": False},
    "split_not_normalised": {"drift_form": "split"},
    "split_over_all_targets": {"drift_form": "split"},  # one coupling, cut in two and normalised
    "split_without_generated": {"drift_form": "split"},
    "split_without_weight": {"drift_form": "split"},
    "split_weight_after_normalisation": {"drift_form": "split"},  # w multiplies P-, whose rows then sum to more than 1
    "attraction_in_the_affinity": {"attraction": 0.5},  # multiplies the positives' sum in the negatives' c as well
    "repulsion_in_the_affinity": {"repulsion": 2.0},
    "repulsion_spares_generated": {"repulsion": 2.0},
    "multipliers_exchanged": {"attraction": 0.5, "repulsion": 2.0},
    "temperatures_averaged": {"field": "per_temperature"},
}


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Options of the field of one feature key. `mutation` makes one named mistake."""

    weight_placement: str = "after"
    affinity_floor: float = 1e-6
    coupling: str = "two_sided"
    sinkhorn_iterations: int = 20
    sinkhorn_marginal: str = "weighted_cols"
    drift_form: str = "joint"
    metric: str = "l2"
    mask_self: bool = True
    attraction: float = 1.0
    repulsion: float = 1.0
    field: str = "summed"
    reduction: str = "release"  # weighs the problems of a key against each other: no value of one problem depends on it
    mutation: str | None = None

    def __post_init__(self):
        if self.mutation is not None and self.mutation not in OPTION_MUTATIONS:
            raise ValueError(f"mutation is {self.mutation!r}; choose one of {tuple(OPTION_MUTATIONS)}")

    def coefficients(self, d, w, tau, scale, mean_square, num_generated, num_repelling):
        """Of distances d [G, M] and weights w [M]: A [G, M], c [G, M], and where row * col is under the floor [G, M].

        The first `num_repelling` targets are generated and unconditional ones, the rest positives.
        """
        l = self._logits(d, tau, scale, mean_square)
        if self.drift_form == "split":
            affinity, c, on_floor = self._split(l, w, num_generated, num_repelling)
        else:
            affinity, c, on_floor = self._joint(l, w, num_repelling)
        attraction, repulsion = self.attraction, self.repulsion
        if self.mutation == "multipliers_exchanged":
            attraction, repulsion = repulsion, attraction
        for i in range(c.shape[0]):
            for j in range(c.shape[1]):
                if j >= num_repelling:
                    c[i, j] *= 1.0 if self.mutation == "attraction_in_the_affinity" else attraction
                elif self.mutation == "repulsion_spares_generated" and j < num_generated:
                    continue
                else:
                    c[i, j] *= 1.0 if self.mutation == "repulsion_in_the_affinity" else repulsion
        return affinity, c, on_floor

    def _logits(self, d, tau, scale, mean_square):
        """-dn / tau, dn = d / max(s, 1e-3) or d^2 over its weighted mean; + 100 for self pairs once scaled. [G, M]"""
        l = np.zeros_like(d)
        for i in range(d.shape[0]):
            for j in range(d.shape[1]):
                masked = i == j and (self.mask_self or self.mutation == "self_masked")
                if self.metric == "l2":
                    dn = d[i, j] / max(scale, SCALE_FLOOR) + (SELF_PAIR_DISTANCE if masked else 0.0)
                elif self.mutation == "square_over_squared_scale":
                    dn = d[i, j] ** 2 / scale**2 + (SELF_PAIR_DISTANCE if masked else 0.0)
                elif self.mutation == "square_masked_before_scaling":
                    dn = (d[i, j] ** 2 + (SELF_PAIR_DISTANCE if masked else 0.0)) / mean_square
                else:
                    dn = d[i, j] ** 2 / mean_square + (SELF_PAIR_DISTANCE if masked else 0.0)
                l[i, j] = -dn / tau
        return l

    def _joint(self, l, w, num_repelling):
        """One coupling over all targets: c_ij = A_ij sum_neg A_i. for positives, -A_ij sum_pos A_i. for negatives."""
        affinity, on_floor = self._affinity(l, w)
        weighed = affinity.copy()
        if self.mutation == "attraction_in_the_affinity":
            weighed[:, num_repelling:] *= self.attraction
        if self.mutation == "repulsion_in_the_affinity":
            weighed[:, :num_repelling] *= self.repulsion
        c = np.zeros_like(l)
        for i in range(l.shape[0]):
            sum_negative, sum_positive = sum(weighed[i, :num_repelling]), sum(weighed[i, num_repelling:])
            for j in range(l.shape[1]):
                c[i, j] = weighed[i, j] * sum_negative if j >= num_repelling else -weighed[i, j] * sum_positive
        return affinity, c, on_floor

    def _split(self, l, w, num_generated, num_repelling):
        """Positives and negatives coupled apart, each divided by max(its row sum, 1e-12): c = [-P-, P+]."""
        affinity, c, on_floor = np.zeros_like(l), np.zeros_like(l), np.zeros(l.shape, dtype=bool)
        first = num_generated if self.mutation == "split_without_generated" else 0
        whole, _ = self._affinity(l, w)
        for begin, end, sign in ((first, num_repelling, -1.0), (num_repelling, l.shape[1], 1.0)):
            if begin == end:
                continue
            side_weights = w[begin:end]
            if self.mutation in ("split_without_weight", "split_weight_after_normalisation"):
                side_weights = np.ones(end - begin)
            side, floored = self._affinity(l[:, begin:end], side_weights)
            if self.mutation == "split_over_all_targets":
                side = whole[:, begin:end]
            for i in range(l.shape[0]):
                row_sum = 1.0 if self.mutation == "split_not_normalised" else max(sum(side[i]), ROW_SUM_FLOOR)
                for j in range(begin, end):
                    affinity[i, j], on_floor[i, j] = side[i, j - begin], floored[i, j - begin]
                    c[i, j] = sign * side[i, j - begin] / row_sum
                    if self.mutation == "split_weight_after_normalisation":
                        c[i, j] *= w[j]
        return affinity, c, on_floor

    def _affinity(self, l, w):
        """The coupling's matrix A of logits l [G, K] and weights w [K], and where row * col is under the floor."""
        if self.coupling == "kernel":
            rows, columns = range(l.shape[0]), range(l.shape[1])
            return np.array([[w[j] * exponential(l[i, j]) for j in columns] for i in rows]), np.zeros(l.shape, dtype=bool)
        if self.coupling == "sinkhorn":
            return self._sinkhorn(l, w), np.zeros(l.shape, dtype=bool)
        bias = self.weight_placement == "log_bias"
        if self.coupling == "row" and self.mutation in ("row_after_in_logits", "row_bias_as_factor"):
            bias = self.mutation == "row_after_in_logits"
        # log_bias: weight 0 is a target that is not there; after: it keeps its share of the row softmax.
        present = [j for j in range(len(w)) if not bias or w[j] > 0]
        shares = range(len(w)) if self.mutation == "absent_target_keeps_share" else present
        log_weight = {j: math.log(w[j]) if bias and w[j] > 0 else 0.0 for j in range(len(w))}
        affinity, on_floor = np.zeros_like(l), np.zeros(l.shape, dtype=bool)
        for i in range(l.shape[0]):
            lse_row = log_sum_exp([l[i, j] + log_weight[j] for j in shares]) if len(present) else 0.0
            for j in range(len(w)):
                if j not in present:  # a row probability of 0
                    on_floor[i, j] = self.coupling == "two_sided" and self.affinity_floor > 0
                    if self.mutation == "absent_target_keeps_floor":
                        affinity[i, j] = math.sqrt(self.affinity_floor)
                    continue
                row = exponential(l[i, j] + log_weight[j] - lse_row)
                col = exponential(l[i, j] - log_sum_exp(l[:, j]))  # log w_j is the same for all rows: it cancels
                if self.coupling == "row":
                    affinity[i, j] = math.sqrt(row) if self.mutation == "root_of_row" else row
                    if self.mutation == "floor_under_row":
                        affinity[i, j] = max(row, self.affinity_floor)
                else:
                    floor = 1e-6 if self.mutation == "floor_of_default" else self.affinity_floor
                    on_floor[i, j] = row * col < floor
                    affinity[i, j] = math.sqrt(max(row * col, floor))
                if not bias or self.mutation == "weight_twice":
                    affinity[i, j] *= w[j]
        return affinity, on_floor

    def _sinkhorn(self, l, w):
        """G times the plan of row mass 1/G and the columns' mass, after updates of the rows' then the columns' potential."""
        num_rows, num_columns = l.shape
        if self.sinkhorn_marginal == "none":
            mass = [1.0 / num_columns] * num_columns
            if self.mutation != "sinkhorn_none_without_bias":
                l = l + np.array([math.log(weight) for weight in w])
        else:
            mass = [max(weight, COLUMN_WEIGHT_FLOOR) for weight in w]
            if self.mutation == "sinkhorn_unweighted_columns":
                mass = [1.0] * num_columns
            mass = [value / sum(mass) for value in mass]
        f, g = np.zeros(num_rows), np.zeros(num_columns)

        def update_rows():
            for i in range(num_rows):
                f[i] = -math.log(num_rows) - log_sum_exp(l[i, :] + g)

        def update_columns():
            for j in range(num_columns):
                g[j] = math.log(mass[j]) - log_sum_exp(l[:, j] + f)

        for _ in range(self.sinkhorn_iterations - (self.mutation == "sinkhorn_one_update_less")):
            if self.mutation == "sinkhorn_columns_first":
                update_columns()
                update_rows()
            else:
                update_rows()
                update_columns()
        if self.mutation == "sinkhorn_ends_on_rows":
            update_rows()
        affinity = np.zeros_like(l)
        for i in range(num_rows):
            for j in range(num_columns):
                affinity[i, j] = exponential(l[i, j] + f[i] + g[j])
                if self.mutation != "sinkhorn_mass_of_one":
                    affinity[i, j] *= num_rows
                if self.mutation in ("sinkhorn_weight_as_factor", "sinkhorn_none_with_factor"):
                    affinity[i, j] *= w[j]
                if self.mutation == "floor_under_sinkhorn":
                    affinity[i, j] = max(affinity[i, j], math.sqrt(self.affinity_floor))
        return affinity


def exponential(value):
    """exp, with 1e-304 for all that is smaller: 0 in every sum, without the denormal range."""
    return math.exp(max(value, -700.0))


def log_sum_exp(values):
    largest = max(values)
    return largest + math.log(sum(exponential(value - largest) for value in values))
