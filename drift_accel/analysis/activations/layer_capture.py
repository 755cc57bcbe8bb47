"""The outputs of a network's modules, by forward hooks, as arrays of one layout.

Shapes: B samples, C channels, H x W places, T tokens of width S. A map [B,C,H,W] stays one, or is averaged over space to [B,C];
tokens [B,T,S] become maps [B,S,1,T], or are averaged to [B,S]; vectors [B,D] stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LayerError(ValueError):
    """A module whose output is no layer of activations."""


def as_activations(output: object, name: str, batch: int, pooled: bool) -> Tensor:
    """A module's output as float32 [B,C] or [B,C,H,W], always a copy: what runs later may write into the original.

    Of several outputs the first is taken. Raises LayerError for other shapes, integers, and a first axis that is not the batch.
    """
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise LayerError(f"layer {name} gives a {type(output).__name__}, not a tensor: choose another")
    if not output.is_floating_point() or output.ndim not in (2, 3, 4) or len(output) != batch:
        raise LayerError(
            f"layer {name} gives {output.dtype} {list(output.shape)}: wanted real [{batch},C,H,W], [{batch},T,S] or [{batch},D]"
        )
    values = output.detach().to(torch.float32, copy=True)
    if values.ndim == 3:
        values = values.transpose(1, 2)[:, :, None]  # [B,S,1,T]
    if pooled and values.ndim == 4:
        values = values.mean(dim=(2, 3))
    return values


@contextmanager
def captured(root: nn.Module, modules: Mapping[str, str], batch: int, pooled: bool) -> Iterator[dict[str, Tensor]]:
    """A dictionary that fills with the activations of `modules` (layer name -> dotted name in `root`) as `root` runs.

    Raises ValueError for a module that does not exist, LayerError (out of the forward pass) for an output that is no layer and
    for a module that runs more than once a pass: which of its outputs were meant?
    """
    found: dict[str, Tensor] = {}
    known = dict(root.named_modules())
    unknown = [dotted for dotted in modules.values() if dotted not in known]
    if unknown:
        raise ValueError(f"the model has no module {unknown[0]!r}: --list_layers shows what it has")

    def saver(name: str) -> Callable:
        def save(_module, _arguments, output) -> None:
            if name in found:
                raise LayerError(f"layer {name} runs more than once in a pass: choose a module that runs once")
            found[name] = as_activations(output, name, batch, pooled)

        return save

    handles = [known[dotted].register_forward_hook(saver(name)) for name, dotted in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def probe_modules(root: nn.Module, run: Callable[[], object], batch: int, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Full shape of one sample of those modules of `names` whose output is a layer, in the order in which they run.

    `run` passes `batch` samples through `root`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    refused: set[str] = set()
    known = dict(root.named_modules())

    def saver(name: str) -> Callable:
        def save(_module, _arguments, output) -> None:
            try:
                shape = tuple(as_activations(output, name, batch, pooled=False).shape[1:])
            except LayerError:
                refused.add(name)
                return
            if name in shapes:
                refused.add(name)
            shapes[name] = shape

        return save

    handles = [known[name].register_forward_hook(saver(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: shape for name, shape in shapes.items() if name not in refused}
