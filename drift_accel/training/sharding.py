"""Tensors that may be split over processes: FSDP2 keeps weights, optimiser state and averages as DTensors.

Everywhere else a tensor is whole or split without the code minding; here is where the two meet. Gathering is collective: every
process of the run must ask for the same tensors in the same order.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory: the whole of a tensor that is not split."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on this process's device; gathered where it is split."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, one after the other, so that only one of them needs room beside the split ones."""
    for name, tensor in tensors.items():
        yield name, whole_tensor(tensor.detach())


def placed_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The whole `tensor` on the device of `pattern`, and split like it. Nothing is communicated: each process takes its part."""
    tensor = tensor.to(pattern.device)
    if not is_sharded(pattern):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's part of it where that one is split."""
    local_part(target).copy_(local_part(placed_like(whole, target)))


def require_same_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError beginning with `what` unless both hold the same names with the same (whole) shapes."""
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    other = [
        f"{name} has shape {list(given[name].shape)}, wanted {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & given.keys())
        if given[name].shape != wanted[name].shape
    ]
    problems = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown] + other
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:3])}{more}")


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model that is not split yet, with its class and settings but weights that take no memory."""
    empty = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in model.parameters()}
    return copy.deepcopy(model, empty)


def model_of(bones: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model of a `skeleton` that holds `weights` (whole, by parameter name) themselves, not copies."""
    model = skeleton(bones)
    model.load_state_dict(dict(weights), strict=False, assign=True)
    return model
