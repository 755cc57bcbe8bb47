"""What tests of the EDM network share: a small configuration, random weights, published names, and diffusers' UNet2DModel.

diffusers writes the same architecture independently of EDM (its consistency models for ImageNet 64x64 are of it), under other
names, with separate queries, keys and values.
"""

import torch
from torch import Tensor, nn

from drift_accel.models import EdmUNet

# Widths that 32 groups divide on all levels, as diffusers has one number of groups for the whole network.
SMALL = {"input_size": 16, "num_classes": 10, "model_channels": 128, "channel_mult": [1, 1, 2], "num_blocks": 1}
SMALL |= {"attention_resolutions": [8], "num_head_channels": 64}
# Widths with fewer than 32 groups, a first entry of channel_mult other than 1, and no attention but the middle's.
TINY = {"input_size": 8, "num_classes": 5, "model_channels": 16, "channel_mult": [2, 3], "num_blocks": 2}
TINY |= {"attention_resolutions": [], "num_head_channels": 16}


def random_network(config: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> EdmUNet:
    """A network none of whose weights is zero or one, so that every part shows in its output."""
    model = EdmUNet(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim < 2 or name.startswith("map_label") else parameter[0].numel() ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.7 * values)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def published_shapes(size: int = 64, classes: int = 1000, width: int = 192, blocks: int = 3) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of EDM's and DMD2's network for multipliers 1, 2, 3, 4 and attention below the full size.

    From two listings, read apart: github.com/tianweiy/DMD2, third_party/edm/training/networks.py (DhariwalUNet, EDMPrecond, which
    is NVlabs/edm's) with demo/imagenet_example.py (strict loading of pytorch_model.bin); and github.com/fls233666/DMD2-Jittor,
    tools/convert_pytorch_ckpt.py (build_dhariwal_name_maps) with tests/test_tools.py, and records/reports/
    pytorch_jittor_precision_alignment.md, which counts 553 tensors in DMD2's ImageNet generator, 12 of them resample_filter.
    """
    emb = 4 * width
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"model.{name}.weight"] = weight
        if bias:
            shapes[f"model.{name}.bias"] = weight[:1]

    def unet_block(name: str, cin: int, cout: int, attention: bool, resample: bool = False) -> None:
        affine(f"{name}.norm0", cin)
        affine(f"{name}.conv0", cout, cin, 3, 3)
        affine(f"{name}.affine", 2 * cout, emb)
        affine(f"{name}.norm1", cout)
        affine(f"{name}.conv1", cout, cout, 3, 3)
        if cin != cout:
            affine(f"{name}.skip", cout, cin, 1, 1)
        if resample:
            shapes[f"model.{name}.conv0.resample_filter"] = shapes[f"model.{name}.skip.resample_filter"] = (1, 1, 2, 2)
        if attention:
            affine(f"{name}.norm2", cout)
            affine(f"{name}.qkv", 3 * cout, cout, 1, 1)
            affine(f"{name}.proj", cout, cout, 1, 1)

    affine("map_layer0", emb, width)
    affine("map_layer1", emb, emb)
    affine("map_label", emb, classes, bias=False)
    resolutions = [f"{size >> level}x{size >> level}" for level in range(4)]
    affine(f"enc.{resolutions[0]}_conv", width, 3, 3, 3)
    stack, channels = [width], width
    for level, resolution in enumerate(resolutions):
        if level:
            unet_block(f"enc.{resolution}_down", channels, channels, attention=False, resample=True)
            stack.append(channels)
        for index in range(blocks):
            unet_block(f"enc.{resolution}_block{index}", channels, (level + 1) * width, attention=level > 0)
            channels = (level + 1) * width
            stack.append(channels)
    unet_block(f"dec.{resolutions[3]}_in0", channels, channels, attention=True)
    unet_block(f"dec.{resolutions[3]}_in1", channels, channels, attention=False)
    for level in (3, 2, 1, 0):
        if level < 3:
            unet_block(f"dec.{resolutions[level]}_up", channels, channels, attention=False, resample=True)
        for index in range(blocks + 1):
            unet_block(f"dec.{resolutions[level]}_block{index}", channels + stack.pop(), (level + 1) * width, level > 0)
            channels = (level + 1) * width
    affine("out_norm", width)
    affine("out_conv", 3, width, 3, 3)
    return shapes


def diffusers_twin(config: dict) -> torch.nn.Module:
    """UNet2DModel of the same architecture, on the device of the surrounding torch.device context."""
    from diffusers import UNet2DModel

    sizes = [config["input_size"] >> level for level in range(len(config["channel_mult"]))]
    attends = [size in config["attention_resolutions"] for size in sizes]
    return UNet2DModel(
        sample_size=config["input_size"],
        in_channels=3,
        out_channels=3,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in attends],
        up_block_types=["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(attends)],
        block_out_channels=[config["model_channels"] * factor for factor in config["channel_mult"]],
        layers_per_block=config["num_blocks"],
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=config["num_head_channels"],
        attn_norm_num_groups=32,
        norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=config["num_classes"],
    ).eval()


def twin_weights(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The weights of an EdmUNet by diffusers' names."""
    levels, last = len(config["channel_mult"]), len(config["channel_mult"]) - 1
    sizes = [config["input_size"] >> level for level in range(levels)]
    names = {f"enc.{sizes[0]}x{sizes[0]}_conv": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out"}
    names |= {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"}
    blocks = {f"dec.{sizes[last]}x{sizes[last]}_in{i}": ("mid_block.resnets", "mid_block.attentions", i) for i in (0, 1)}
    for level, size in enumerate(sizes):
        for half, side, place in (("enc", "down_blocks", level), ("dec", "up_blocks", last - level)):
            for index in range(config["num_blocks"] + (half == "dec")):
                home = f"{side}.{place}"
                blocks[f"{half}.{size}x{size}_block{index}"] = (f"{home}.resnets", f"{home}.attentions", index)
        if level:
            # A resampling block belongs to the level above it in diffusers, to the one below in EDM.
            blocks[f"enc.{size}x{size}_down"] = (f"down_blocks.{level - 1}.downsamplers", "", 0)
            blocks[f"dec.{sizes[level - 1]}x{sizes[level - 1]}_up"] = (f"up_blocks.{last - level}.upsamplers", "", 0)
    parts = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
    parts |= {"skip": "conv_shortcut"}
    twin = {"class_embedding.weight": state["map_label.weight"].T}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            twin[f"{names[module]}.{kind}"] = value
        elif module != "map_label":
            block, _, part = module.rpartition(".")
            resnets, attentions, index = blocks[block]
            if part in parts:
                twin[f"{resnets}.{index}.{parts[part]}.{kind}"] = value
            elif part == "norm2":
                twin[f"{attentions}.{index}.group_norm.{kind}"] = value
            elif part == "proj":
                twin[f"{attentions}.{index}.to_out.0.{kind}"] = value.flatten(1) if kind == "weight" else value
            else:
                for j, target in enumerate(("to_q", "to_k", "to_v")):
                    rows = value[j::3]
                    twin[f"{attentions}.{index}.{target}.{kind}"] = rows.flatten(1) if kind == "weight" else rows
    return twin
