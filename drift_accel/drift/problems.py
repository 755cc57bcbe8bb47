"""A set of independent drift problems: the members of each, checked once.

Shapes: B problems (class x location), G generated, P positives, N unconditional negatives, S feature dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATING_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DriftProblems:
    """The features of one key: generated [B,G,S], positives [B,P,S], negatives [B,N,S] or None, negative_weight [B,N] or None.

    Targets are always ordered [generated | negatives | positives]; a missing weight means 1.
    Raises ValueError naming the argument, what was given and what is wanted.
    """

    generated: Tensor
    positives: Tensor
    negatives: Tensor | None = None
    negative_weight: Tensor | None = None

    def __post_init__(self):
        self._check_features("generated", self.generated)
        self._check_features("positives", self.positives)
        if self.negatives is not None:
            self._check_features("negatives", self.negatives)
        if self.num_generated == 0:
            raise ValueError(f"generated has shape {_shape(self.generated)}: at least one generated sample is needed")
        if self.num_positives == 0:
            raise ValueError(f"positives has shape {_shape(self.positives)}: without positives there is nothing to move towards")
        self._check_weight()

    def _check_features(self, name: str, features: Tensor) -> None:
        if features.ndim != 3:
            raise ValueError(f"{name} has shape {_shape(features)}: wanted three axes [problems, members, features]")
        if features.dtype not in FLOATING_TYPES:
            raise ValueError(f"{name} has type {features.dtype}: wanted one of float32, float64, bfloat16, float16")
        wanted = self.generated.shape
        if features.shape[0] != wanted[0] or features.shape[2] != wanted[2]:
            raise ValueError(
                f"{name} has shape {_shape(features)} but generated has {_shape(self.generated)}: "
                "problems (axis 0) and features (axis 2) must agree"
            )
        if features.device != self.generated.device or features.dtype != self.generated.dtype:
            raise ValueError(
                f"{name} is {features.dtype} on {features.device} but generated is {self.generated.dtype} on "
                f"{self.generated.device}: convert them to one type and device first"
            )
        if features.shape[2] == 0:
            raise ValueError(f"{name} has shape {_shape(features)}: the feature dimension is empty")

    def _check_weight(self) -> None:
        weight = self.negative_weight
        if weight is None:
            return
        if self.negatives is None:
            raise ValueError(f"negative_weight has shape {_shape(weight)} but there are no negatives: give both or neither")
        if weight.shape != self.negatives.shape[:2]:
            raise ValueError(
                f"negative_weight has shape {_shape(weight)}: wanted one weight a negative, {list(self.negatives.shape[:2])}"
            )

    @property
    def num_problems(self) -> int:
        return self.generated.shape[0]

    @property
    def num_generated(self) -> int:
        return self.generated.shape[1]

    @property
    def num_negatives(self) -> int:
        return 0 if self.negatives is None else self.negatives.shape[1]

    @property
    def num_positives(self) -> int:
        return self.positives.shape[1]

    @property
    def num_features(self) -> int:
        return self.generated.shape[2]

    @property
    def arithmetic_type(self) -> torch.dtype:
        """float64 for float64 features, float32 for all others: the drift is never computed in half precision."""
        return torch.float64 if self.generated.dtype == torch.float64 else torch.float32


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
