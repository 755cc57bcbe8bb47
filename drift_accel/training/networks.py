"""How the networks of a run are laid out and compiled, and that their master weights are what the run was promised."""

import torch
from torch import nn

# Blocks of one kind share their compiled code, but each shape, channel count and grad mode needs a version: a ResNet has
# seven kinds of block times the real, the generated and the gradient-free batch. Dynamo's limit of 8 would fall back to eager.
COMPILED_VERSIONS = 64


def lay_out_encoder(encoder: nn.Module, device: torch.device) -> nn.Module:
    """Convolution weights in channels_last on a GPU, whose tensor cores want it.

    Not on a processor: there the feature maps of the digits' encoder took 1.4 to 1.9 times as long, and bits would change.
    """
    return encoder.to(memory_format=torch.channels_last) if device.type == "cuda" else encoder


def compile_blocks(model: nn.Module, mode: str) -> nn.Module:
    """Compile each repeated block in place for `mode` "blocks"; names of weights stay as they are. "none" does nothing.

    Compiled code rounds otherwise, also between passes with and without gradient. The first steps take minutes.
    """
    if mode == "blocks":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VERSIONS)
        model.compile_repeated_blocks(dynamic=False)
    return model


def require_master_weights(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Raise ValueError unless every trained weight has `dtype`, as the model and as the optimiser see it.

    Under autocast a half-precision master weight would swallow small updates without a word; a launcher's settings can make one.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    held = [("of the optimiser", parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wrong = [f"{name} ({parameter.dtype})" for name, parameter in [*named, *held] if parameter.dtype != dtype]
    if wrong:
        raise ValueError(
            f"{len(wrong)} master weights are not {dtype}, first {', '.join(wrong[:3])}: start with --mixed_precision no; "
            "precision 'bfloat16' of this trainer is autocast over float32 weights"
        )
