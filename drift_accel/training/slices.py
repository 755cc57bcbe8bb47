"""Label slices: the labels of a step in parts that fit the memory, and over which samples the drift's statistics are taken.

A step's statistics (s and n_tau of every key, arXiv 2602.04770, algorithm 2) couple all its labels, but a slice sees only its
own. What `statistics` chooses between, for a process with several slices:

  global  s and n_tau of all slices and processes, so the result does not depend on the slicing. Costs a second forward pass
          of the networks (a third where the kept products do not fit `statistics_memory_gb`). The method as published.
  lagged  the previous step's global values: one pass. They change little from step to step, except in the first ones, in which
          the field grows a hundredfold: the loss is large there, and clipping bounds what the gradient does.
  slice   one slice over all processes: one pass; noisier, the smaller the slices.
  rank    one slice of this process alone: one pass and no communication; the loss depends on the number of processes.

With one slice a process, `global` needs no extra pass: stages 1 to 3 of the drift run one after the other on kept features.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from drift_accel.drift import DriftConfig, DriftProblems, DriftStatistics
from drift_accel.drift.slice_statistics import (
    TargetProducts,
    add_distance_sums,
    add_norm_sums,
    distance_sums,
    norm_sums,
    norm_sums_of_products,
    target_products,
    target_products_bytes,
)
from drift_accel.drift.statistics import DistanceSums, NormSums, reduce_distance_sums, reduce_norm_sums
from drift_accel.training.step import DriftBatch
from drift_accel.training.step_parts import step_part

STATISTICS_MODES = ("global", "lagged", "slice", "rank")
STATE_PREFIX = "statistics/"  # of the lagged statistics among a checkpoint's data state

Problems = Mapping[str, DriftProblems]
Extract = Callable[[DriftBatch], Problems]  # a slice's feature keys, without gradient
Autocast = Callable[[], AbstractContextManager]


def slice_batch(batch: DriftBatch, labels_per_slice: int | None) -> list[DriftBatch]:
    """Views of a batch's labels, `labels_per_slice` at a time (the last may have fewer); None: all in one."""
    num_labels = batch.labels.shape[0]
    if labels_per_slice is None or labels_per_slice >= num_labels:
        return [batch]
    return [batch.labels_from(start, start + labels_per_slice) for start in range(0, num_labels, labels_per_slice)]


class StepStatistics:
    """The statistics that each slice of a step is computed with. Every process must go through the same calls.

    `mode` is one of STATISTICS_MODES, `group` the process group of the run, `memory_gb` what `global` may keep between its
    passes, `log` gets one line about that choice.
    """

    def __init__(self, mode: str, drift: DriftConfig, *, group, memory_gb: float, log: Callable[[str], None]):
        self.mode, self.drift, self.group = mode, drift, group
        self._memory_bytes, self._log, self._told = memory_gb * 1e9, log, False
        self._given: dict[str, DriftStatistics] | None = None  # of this step, from before its gradient pass
        self._previous: dict[str, DriftStatistics] | None = None  # of the step before, for "lagged"
        self._first_flag: Tensor | None = None  # of the step that gave the first ones
        self._distances: dict[str, DistanceSums] | None = None
        self._norms: dict[str, NormSums] | None = None

    def prepare(self, slices: Sequence[DriftBatch], extract: Extract) -> None:
        """Before the gradient pass: find the statistics that must be known by then, in passes without gradient."""
        self._given = None
        if self._first_flag is not None:
            # Once in a run the host reads a flag: statistics of a first step that was not finite would never become finite.
            self._previous = None if bool(self._first_flag) else self._previous
            self._first_flag = None
        if self.mode == "lagged" and self._previous is not None:
            self._given = self._previous
        elif self.mode == "lagged" or (self.mode == "global" and len(slices) > 1):
            self._given = self._over_all_slices(slices, extract)

    def of_slice(self) -> dict:
        """`statistics` and `group` for the drift of the next slice."""
        if self._given is not None:
            return {"statistics": self._given, "group": None}
        return {"statistics": None, "group": None if self.mode == "rank" else self.group}

    def observe(self, problems: Problems) -> None:
        """Add a slice to what the next step will be given; s under this step's features, n_tau under the given scale."""
        if self.mode != "lagged" or self._previous is None:
            return
        with step_part("drift"):
            self._distances = add_distance_sums(self._distances, distance_sums(problems, self.drift))
            self._norms = add_norm_sums(self._norms, norm_sums(problems, self._given, self.drift))

    def end_step(self, non_finite: Tensor) -> dict[str, Tensor]:
        """What a checkpoint of this step must keep: {name: [2 + temperatures]}, nothing but for "lagged".

        Where the flag `non_finite` () is not 0 the step has not happened, and the statistics stay as they were.
        """
        if self.mode != "lagged":
            return {}
        if self._previous is None:
            self._previous, self._first_flag = self._given, non_finite
        else:
            scales = reduce_distance_sums(self._distances, self.group)
            new = reduce_norm_sums(self._norms, scales, self.group)
            before = {key: self._previous[key] for key in new}  # a checkpoint gives the keys in another order
            packed = torch.where(non_finite > 0, self._pack(before), self._pack(new))
            self._previous = self._unpack(list(new), packed)
        self._distances = self._norms = None
        return {f"{STATE_PREFIX}{key}": row for key, row in zip(self._previous, self._pack(self._previous), strict=True)}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `end_step` gave. Raises ValueError where the temperatures are others."""
        if self.mode != "lagged" or not state:
            return
        rows = {name.removeprefix(STATE_PREFIX): row for name, row in state.items()}
        wanted = 2 + len(self.drift.temperatures)
        for key, row in rows.items():
            if tuple(row.shape) != (wanted,):
                raise ValueError(
                    f"the checkpoint's statistics of key {key!r} have {list(row.shape)} numbers, wanted {wanted} (scale, mean "
                    "square, one a temperature): restore drift.temperatures"
                )
        packed = torch.stack(list(rows.values())).to(device)
        if torch.isfinite(packed).all():  # those of a skipped first step are taken anew
            self._previous = self._unpack(list(rows), packed)

    def _over_all_slices(self, slices: Sequence[DriftBatch], extract: Extract) -> dict[str, DriftStatistics]:
        """s and n_tau of every key over all slices and processes (steps 2 and 6): pass 1, and pass 2 where nothing was kept."""
        sums, kept = None, []
        keeps = None
        for part in slices:
            problems = extract(part)
            with step_part("drift"):
                keeps = self._keeps_products(problems, part, slices) if keeps is None else keeps
                sums = add_distance_sums(sums, distance_sums(problems, self.drift))
                if keeps:
                    kept.append({key: target_products(members) for key, members in problems.items()})
            del problems  # the next slice's features must not lie beside these
        with step_part("drift"):
            scales = reduce_distance_sums(sums, self.group)
        norms = self._norms_of_kept(kept, scales) if keeps else self._norms_of_second_pass(slices, extract, scales)
        with step_part("drift"):
            return reduce_norm_sums(norms, scales, self.group)

    def _norms_of_kept(self, kept: list[dict[str, TargetProducts]], scales: Mapping) -> dict[str, NormSums]:
        norms = None
        with step_part("drift"):
            while kept:
                products = kept.pop(0)
                sums = {key: norm_sums_of_products(products.pop(key), scales[key], self.drift) for key in list(products)}
                norms = add_norm_sums(norms, sums)
        return norms

    def _norms_of_second_pass(self, slices: Sequence[DriftBatch], extract: Extract, scales: Mapping) -> dict[str, NormSums]:
        norms = None
        for part in slices:
            problems = extract(part)
            with step_part("drift"):
                norms = add_norm_sums(norms, norm_sums(problems, scales, self.drift))
            del problems
        return norms

    def _keeps_products(self, problems: Problems, part: DriftBatch, slices: Sequence[DriftBatch]) -> bool:
        """Whether the products of all slices fit; the same on every process, because shapes alone decide."""
        num_labels = sum(each.labels.shape[0] for each in slices)
        needed = target_products_bytes(problems) // part.labels.shape[0] * num_labels
        keeps = needed <= self._memory_bytes
        if not self._told:
            limit = f"statistics_memory_gb {self._memory_bytes / 1e9:.4g}"
            self._log(
                f"statistics over {len(slices)} slices: products of targets take {needed:,} bytes a process ({limit}); they are "
                + ("kept: one extra forward pass a step" if keeps else "not kept: two extra forward passes a step")
            )
            self._told = True
        return keeps

    def _pack(self, statistics: Mapping[str, DriftStatistics]) -> Tensor:
        """[keys, 2 + temperatures]: s, mean square, n_tau in the order of the configuration."""
        rows = [
            torch.stack([s.scale, s.mean_squared_distance, *(s.drift_sqnorm[t] for t in self.drift.temperatures)])
            for s in statistics.values()
        ]
        return torch.stack(rows)

    def _unpack(self, keys: Sequence[str], packed: Tensor) -> dict[str, DriftStatistics]:
        return {
            key: DriftStatistics(
                scale=row[0],
                mean_squared_distance=row[1],
                drift_sqnorm=dict(zip(self.drift.temperatures, row[2:].unbind(), strict=True)),
            )
            for key, row in zip(keys, packed.unbind(), strict=True)
        }
