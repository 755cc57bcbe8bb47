"""Reader of the release's artifact folders: metadata.json and ema_params.msgpack, a flax tree, without jax or flax.

Format: flax.serialization writes nested maps whose leaves are msgpack extension 1 (an array) or 3 (a scalar), each a
packed (shape, dtype name, bytes); an array above 1 GiB is a map of chunks. Layouts: dense kernels [in, out],
convolution kernels [rows, columns, in, out], against torch's [out, in] and [out, in, rows, columns].
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from .generator import Generator
from .masked_autoencoder import MaskedAutoencoder

WEIGHTS_NAME = "ema_params.msgpack"
METADATA_NAME = "metadata.json"
CHUNKED_MARK = "__msgpack_chunked_array__"
ARRAY_EXTENSIONS = (1, 3)
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The side of the published masked autoencoders' grid: their metadata does not say it, and any other fits as well.
MAE_GRID_SIZE = 32

GENERATOR_SETTINGS = {
    "cond_dim": "condition_size",
    "num_classes": "num_classes",
    "noise_classes": "style_codebook_size",
    "noise_coords": "num_style_tokens",
    "input_size": "input_size",
    "in_channels": "in_channels",
    "n_cls_tokens": "num_context_tokens",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
}
MAE_SETTINGS = {
    "num_classes": "num_classes",
    "in_channels": "in_channels",
    "base_channels": "width",
    "patch_size": "mask_patch_size",
    "input_patch_size": "input_patch_size",
    "layers": "blocks",
}
# Settings that change how the release computes, never what.
COMPUTE_SETTINGS = {"use_bf16", "attn_fp32", "use_remat"}


def load_official(directory: str | os.PathLike) -> Generator | MaskedAutoencoder:
    """Build the model of one of the release's artifact folders, in float32 on the CPU and in evaluation mode.

    The weights are `ema_params.msgpack` in the folder, or the file that metadata.json names as `path`.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a damaged file, another format or kind, a setting this project does not implement, or a tensor that
            is missing, unknown, or of another shape or dtype.
    """
    directory = Path(directory)
    metadata = _read_metadata(directory)
    if metadata.get("format", "flax.msgpack") != "flax.msgpack":
        raise ValueError(
            f"{directory / METADATA_NAME}: format is {metadata['format']!r}, wanted 'flax.msgpack'; "
            "use the release's JAX artifact"
        )
    if metadata.get("kind") not in ("gen", "mae"):
        raise ValueError(
            f"{directory / METADATA_NAME}: kind is {metadata.get('kind')!r}, wanted 'gen' (a generator) or "
            "'mae' (a masked autoencoder); give the folder of one of these"
        )
    if not isinstance(metadata.get("model_config"), dict):
        raise ValueError(f"{directory / METADATA_NAME}: model_config is missing; download the folder's metadata again")
    is_generator = metadata["kind"] == "gen"
    read_config = _generator_config if is_generator else _mae_config
    config = read_config(metadata["model_config"], directory / METADATA_NAME)
    with torch.device("meta"):
        model = Generator(**config) if is_generator else MaskedAutoencoder(**config)
    sources = dict(_generator_sources(model) if is_generator else _mae_sources(model))

    weights_path = _find_weights(directory, metadata)
    found = _flatten(_read_msgpack(weights_path), weights_path)
    model.load_state_dict(_translate(found, sources, model.state_dict(), weights_path), assign=True)
    return model.eval()


def _read_metadata(directory: Path) -> dict[str, Any]:
    """Read metadata.json."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no folder; give the folder that holds {METADATA_NAME}")
    path = directory / METADATA_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download it from the release beside the weights")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); download it again") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, wanted an object; download it again")
    return metadata


def _find_weights(directory: Path, metadata: dict[str, Any]) -> Path:
    """Return the weights' path: the usual name, or the one in the metadata if it lies inside the folder."""
    candidates = [directory / WEIGHTS_NAME]
    if isinstance(metadata.get("path"), str):
        named = directory / metadata["path"]
        if not named.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{directory / METADATA_NAME}: path {metadata['path']!r} leaves the folder; refused")
        candidates.append(named)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"{looked} is missing; download the weights from the release beside {METADATA_NAME}")


def _take_settings(model_config: dict[str, Any], names: dict[str, str], fixed: dict[str, Any], path: Path) -> dict[str, Any]:
    """Rename the release's settings to ours; refuse missing and unknown ones and other values than `fixed`."""
    missing = sorted((set(names) | set(fixed)) - set(model_config))
    if missing:
        raise ValueError(f"{path}: model_config lacks {missing}; download the folder's metadata again")
    unknown = sorted(set(model_config) - set(names) - set(fixed) - COMPUTE_SETTINGS)
    if unknown:
        raise ValueError(
            f"{path}: model_config has unknown settings {unknown}; remove them from the file only if they do not "
            "change the mathematics"
        )
    for name, wanted in fixed.items():
        if model_config[name] != wanted:
            raise ValueError(
                f"{path}: model_config {name} is {model_config[name]!r}; only {wanted!r} is implemented, "
                "as in all published models"
            )
    return {ours: model_config[theirs] for theirs, ours in names.items()}


def _generator_config(model_config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return Generator's configuration for the release's."""
    switches = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")
    fixed = {**dict.fromkeys(switches, True), "out_channels": model_config.get("in_channels")}
    return _take_settings(model_config, GENERATOR_SETTINGS, fixed, path)


def _mae_config(model_config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return MaskedAutoencoder's configuration for the release's."""
    config = _take_settings(model_config, MAE_SETTINGS, {"dropout_prob": 0.0}, path)
    return {**config, "input_size": MAE_GRID_SIZE * config["input_patch_size"]}


def _read_msgpack(path: Path) -> dict[str, Any]:
    """Unpack a flax msgpack file into nested dicts of tensors that share no memory with it."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; download it again")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = msgpack.unpackb(data, ext_hook=_unpack_array, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, wanted a tree of named arrays; download it again")
    return tree


def _unpack_array(code: int, data: bytes) -> Tensor | str:
    """Turn one extension value into a tensor, or into the name of a dtype that no weight may have."""
    if code not in ARRAY_EXTENSIONS:
        return f"extension {code}"
    shape, dtype_name, content = msgpack.unpackb(data, raw=False)
    dtype = FLOAT_DTYPES.get(dtype_name)
    if dtype is None:
        return str(dtype_name)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {list(shape)} in {dtype_name} has {len(content)} bytes")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def _flatten(tree: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dicts to slash-joined names, joining the chunks of large arrays."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and CHUNKED_MARK in value:
            value = _join_chunks(value, name, path)
        if isinstance(value, dict):
            flat.update(_flatten(value, path, f"{name}/"))
        elif isinstance(value, Tensor):
            flat[name] = value
        else:
            kind = f"has dtype {value}" if isinstance(value, str) else f"is a {type(value).__name__}"
            raise ValueError(f"{path}: {name} {kind}, wanted an array of {sorted(FLOAT_DTYPES)}; download it again")
    return flat


def _join_chunks(chunked: dict[str, Any], name: str, path: Path) -> Any:
    """Join an array that was stored in flat chunks; both lists are maps keyed "0", "1", .. ."""
    try:
        shape = [chunked["shape"][str(k)] for k in range(len(chunked["shape"]))]
        chunks = [chunked["chunks"][str(k)] for k in range(len(chunked["chunks"]))]
        unreadable = [chunk for chunk in chunks if not isinstance(chunk, Tensor)]
        return unreadable[0] if unreadable else torch.cat(chunks).reshape(shape)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the chunks of {name} do not fit together ({error}); download it again") from error


def _affine(ours: str, theirs: str, weight: str, bias: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yield the weight, called `weight` there, and the bias of one layer."""
    yield f"{ours}.weight", [f"{theirs}/{weight}"]
    if bias:
        yield f"{ours}.bias", [f"{theirs}/bias"]


def _generator_sources(model: Generator) -> Iterator[tuple[str, list[str]]]:
    """Yield each of our tensors' names with the release's tensors that it is made of, stacked by rows."""

    def dense(ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
        return _affine(ours, f"{theirs}/Dense_0", "kernel")

    yield "class_embedding.weight", ["Embed_0/embedding"]
    if model.num_style_tokens:
        yield "style_embedding.weight", [f"noise_embeds_{k}/embedding" for k in range(model.num_style_tokens)]
    yield from dense("guidance_embedding.hidden", "TimestepEmbedder_0/TorchLinear_0")
    yield from dense("guidance_embedding.output", "TimestepEmbedder_0/TorchLinear_1")
    yield "guidance_embedding.norm.weight", ["RMSNorm_0/weight"]
    root = "LightningDiT_0"
    yield from dense("patch_embedding", f"{root}/TorchLinear_0")
    yield from dense("context_projection", f"{root}/TorchLinear_1")
    yield "position_embedding", [f"{root}/pos_embed"]
    yield "context_embedding", [f"{root}/cls_embed"]
    for k in range(len(model.blocks)):
        ours, theirs = f"blocks.{k}", f"{root}/blocks_{k}"
        yield from dense(f"{ours}.modulation", f"{theirs}/TorchLinear_0")
        yield f"{ours}.attention_norm.weight", [f"{theirs}/RMSNorm_0/weight"]
        yield from dense(f"{ours}.attention.qkv", f"{theirs}/Attention_0/TorchLinear_0")
        yield f"{ours}.attention.query_norm.weight", [f"{theirs}/Attention_0/q_norm/weight"]
        yield f"{ours}.attention.key_norm.weight", [f"{theirs}/Attention_0/k_norm/weight"]
        yield from dense(f"{ours}.attention.output", f"{theirs}/Attention_0/TorchLinear_1")
        yield f"{ours}.mlp_norm.weight", [f"{theirs}/RMSNorm_1/weight"]
        for index, name in enumerate(("gate", "up", "down")):
            yield from dense(f"{ours}.mlp.{name}", f"{theirs}/SwiGLUFFN_0/TorchLinear_{index}")
    yield "final_layer.norm.weight", [f"{root}/FinalLayer_0/RMSNorm_0/weight"]
    yield from dense("final_layer.modulation", f"{root}/FinalLayer_0/TorchLinear_0")
    yield from dense("final_layer.output", f"{root}/FinalLayer_0/TorchLinear_1")


def _mae_sources(model: MaskedAutoencoder) -> Iterator[tuple[str, list[str]]]:
    """Yield each of our tensors' names with the release's tensor."""

    def norm(ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
        return _affine(ours, theirs, "scale")

    def convolution_norm(ours: str, theirs: str, convolution: str, gn: str) -> Iterator[tuple[str, list[str]]]:
        yield from _affine(f"{ours}.convolution", f"{theirs}/{convolution}", "kernel", bias=False)
        yield from norm(f"{ours}.norm", f"{theirs}/{gn}")

    yield from convolution_norm("encoder.stem", "encoder", "conv1", "gn1")
    for s, stage in enumerate(model.encoder.stages):
        yield from norm(f"encoder.stages.{s}.norm", f"encoder/layer{s + 1}_norm")
        for k, block in enumerate(stage.blocks):
            ours, theirs = f"encoder.stages.{s}.blocks.{k}", f"encoder/stages_{s}/layers_{k}"
            pairs = [("convolution1", "conv1", "norm1", "gn1"), ("convolution2", "conv2", "norm2", "gn2")]
            if block.has_projection:
                pairs.append(("shortcut_convolution", "proj_conv", "shortcut_norm", "proj_gn"))
            for our_convolution, their_convolution, our_norm, their_norm in pairs:
                yield f"{ours}.{our_convolution}.weight", [f"{theirs}/{their_convolution}/kernel"]
                yield from norm(f"{ours}.{our_norm}", f"{theirs}/{their_norm}")
    yield from convolution_norm("decoder.bridge", "decoder/bridge", "conv", "gn")
    for k, name in enumerate(("up43", "up32", "up21", "up10")):
        ours, theirs = f"decoder.up_blocks.{k}", f"decoder/{name}"
        yield from norm(f"{ours}.concat_norm", f"{theirs}/concat_norm_fn")
        yield from convolution_norm(f"{ours}.project", f"{theirs}/proj", "conv", "gn")
        yield from convolution_norm(f"{ours}.refine", f"{theirs}/refine", "conv", "gn")
    yield from _affine("decoder.output", "decoder/head", "kernel")
    yield from _affine("classifier", "fc", "kernel")


def _translate(
    found: dict[str, Tensor], sources: dict[str, list[str]], wanted: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Return our state dict from the release's tensors, after comparing names and shapes."""
    expected = {name for names in sources.values() for name in names}
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its metadata: missing tensors {missing[:5]} ({len(missing)}), unknown tensors "
            f"{extra[:5]} ({len(extra)}); check that both files are of one model and download them again"
        )
    state = {}
    for ours, theirs in sources.items():
        rows = wanted[ours].shape[0] // len(theirs)
        parts = []
        for name in theirs:
            tensor = _to_torch_layout(found[name], name)
            shape = (rows, *wanted[ours].shape[1:])
            if tensor.shape != shape:
                layout = list(_to_release_layout(torch.empty(shape, device="meta"), name).shape)
                raise ValueError(
                    f"{path}: {name} has shape {list(found[name].shape)}, wanted {layout} by the metadata; "
                    "check that both files are of one model"
                )
            parts.append(tensor.float())
        state[ours] = (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
    return state


def _to_torch_layout(tensor: Tensor, name: str) -> Tensor:
    """Move the last two axes of a kernel, (in, out), to the front as (out, in)."""
    if not name.endswith("/kernel"):
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.movedim((-1, -2), (0, 1)) if tensor.ndim == 4 else tensor


def _to_release_layout(tensor: Tensor, name: str) -> Tensor:
    """Undo `_to_torch_layout`."""
    if not name.endswith("/kernel"):
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.movedim((0, 1), (-1, -2))
