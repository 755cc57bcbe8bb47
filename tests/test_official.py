"""Reading the release's artifact folders: every tensor is placed, and whatever does not fit is refused by name."""

import json

import msgpack
import pytest
import torch
from golden_files import unpack_artifact

from drift_accel.models import Generator, MaskedAutoencoder, load_official

QKV = ("LightningDiT_0", "blocks_1", "Attention_0", "TorchLinear_0", "Dense_0", "kernel")


def pack_array(shape, dtype: str, content: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((list(shape), dtype, content)))


def read_tree(folder) -> dict:
    return msgpack.unpackb((folder / "ema_params.msgpack").read_bytes())


def write_tree(folder, tree) -> None:
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree))


def change_metadata(folder, **changes) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_setting(folder, **changes) -> None:
    settings = json.loads((folder / "metadata.json").read_text())["model_config"]
    change_metadata(folder, model_config={**settings, **changes})


def change_array(folder, change) -> None:
    """Replace one kernel (its extension value) by change(shape, dtype, bytes)."""
    tree = read_tree(folder)
    node = tree
    for name in QKV[:-1]:
        node = node[name]
    node[QKV[-1]] = change(*msgpack.unpackb(node[QKV[-1]].data))
    write_tree(folder, tree)


@pytest.fixture
def folder(tmp_path):
    return unpack_artifact("generator", tmp_path)


def test_kinds_configurations_and_state(tmp_path):
    generator = load_official(unpack_artifact("generator", tmp_path))
    encoder = load_official(unpack_artifact("mae", tmp_path))
    pixel = load_official(unpack_artifact("mae_pixel", tmp_path))
    assert isinstance(generator, Generator)
    assert isinstance(encoder, MaskedAutoencoder)
    assert (generator.config.condition_size, generator.config.num_style_tokens) == (48, 4)
    assert (encoder.config.width, encoder.input_space, list(encoder.config.blocks)) == (32, "latent", [2, 3, 2, 1])
    assert (pixel.input_patch_size, pixel.input_space, pixel.config.input_size) == (4, "pixel", 128)
    for model in (generator, encoder, pixel):
        assert not model.training
        assert {(p.dtype, p.device.type, p.requires_grad) for p in model.parameters()} == {(torch.float32, "cpu", True)}
        assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_loaded_model_saves_as_safetensors_and_comes_back(folder, tmp_path):
    model = load_official(folder)
    model.save_pretrained(tmp_path / "export")
    weights = Generator.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_chunked_arrays_are_joined(folder):
    wanted = load_official(folder).state_dict()

    def chunk(shape, dtype, content):
        cut = 4 * 1000
        pieces = [content[i : i + cut] for i in range(0, len(content), cut)]
        chunks = {str(k): pack_array([len(piece) // 4], dtype, piece) for k, piece in enumerate(pieces)}
        return {"__msgpack_chunked_array__": True, "shape": {str(k): n for k, n in enumerate(shape)}, "chunks": chunks}

    change_array(folder, chunk)
    found = load_official(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_widened_exactly(folder, dtype):
    wanted = load_official(folder).blocks[1].attention.qkv.weight

    def narrow(shape, _, content):
        values = torch.frombuffer(bytearray(content), dtype=torch.float32).to(dtype)
        return pack_array(shape, str(dtype).removeprefix("torch."), bytes(values.view(torch.uint8).tolist()))

    change_array(folder, narrow)
    found = load_official(folder).blocks[1].attention.qkv.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.to(dtype).float())


def test_weights_are_found_where_the_metadata_says(folder):
    (folder / "params_ema").mkdir()
    (folder / "ema_params.msgpack").rename(folder / "params_ema" / "ema_params.msgpack")
    assert isinstance(load_official(folder), Generator)


def drop(folder):
    tree = read_tree(folder)
    del tree["LightningDiT_0"]["blocks_2"]["RMSNorm_1"]
    write_tree(folder, tree)


def add(folder):
    write_tree(folder, {**read_tree(folder), "noise_embeds_4": {"embedding": pack_array([1], "float32", bytes(4))}})


def truncate(folder):
    path = folder / "ema_params.msgpack"
    path.write_bytes(path.read_bytes()[:-1000])


def swap_shape(shape, dtype, content):
    return pack_array(shape[::-1], dtype, content)


def break_chunks(shape, dtype, content):
    return {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": pack_array([1], dtype, content[:4])}}


REFUSALS = {
    "missing tensor": (drop, ValueError, r"missing tensors \['LightningDiT_0/blocks_2/RMSNorm_1/weight'\] \(1\)"),
    "unknown tensor": (add, ValueError, r"unknown tensors \['noise_embeds_4/embedding'\] \(1\)"),
    "wrong shape": (
        lambda f: change_array(f, swap_shape),
        ValueError,
        r"Attention_0/.* has shape \[192, 64\], wanted \[64, 192\]",
    ),
    "wrong rank": (
        lambda f: change_array(f, lambda s, d, c: pack_array([64 * 192], d, c)),
        ValueError,
        r"has shape \[12288\], wanted \[64, 192\]",
    ),
    "wrong dtype": (
        lambda f: change_array(f, lambda s, d, c: pack_array(s, "int32", c)),
        ValueError,
        "kernel has dtype int32, wanted",
    ),
    "other extension": (
        lambda f: change_array(f, lambda s, d, c: msgpack.ExtType(9, c)),
        ValueError,
        "kernel has dtype extension 9",
    ),
    "no array": (lambda f: change_array(f, lambda s, d, c: [1, 2]), ValueError, "kernel is a list"),
    "missing bytes": (
        lambda f: change_array(f, lambda s, d, c: pack_array(s, d, c[:-4])),
        ValueError,
        "truncated or damaged .*bytes",
    ),
    "broken chunks": (lambda f: change_array(f, break_chunks), ValueError, "the chunks of .*kernel do not fit"),
    "truncated file": (truncate, ValueError, "ema_params.msgpack is truncated or damaged"),
    "empty file": (lambda f: (f / "ema_params.msgpack").write_bytes(b""), ValueError, "is empty"),
    "no tree": (lambda f: write_tree(f, [1]), ValueError, "holds a list"),
    "missing weights": (lambda f: (f / "ema_params.msgpack").unlink(), FileNotFoundError, "params_ema.* is missing"),
    "missing metadata": (lambda f: (f / "metadata.json").unlink(), FileNotFoundError, "metadata.json is missing"),
    "broken metadata": (lambda f: (f / "metadata.json").write_text("{"), ValueError, "no valid JSON"),
    "metadata no object": (lambda f: (f / "metadata.json").write_text("[]"), ValueError, "holds a list"),
    "other kind": (lambda f: change_metadata(f, kind="vae"), ValueError, "kind is 'vae', wanted 'gen'"),
    "kind of the other model": (lambda f: change_metadata(f, kind="mae"), ValueError, "model_config lacks"),
    "other format": (lambda f: change_metadata(f, format="torch"), ValueError, "format is 'torch'"),
    "no settings": (lambda f: change_metadata(f, model_config=None), ValueError, "model_config is missing"),
    "path outside": (lambda f: change_metadata(f, path="../weights.msgpack"), ValueError, "leaves the folder"),
    "no rotation": (lambda f: change_setting(f, use_rope=False), ValueError, "use_rope is False; only True"),
    "no query norm": (lambda f: change_setting(f, use_qknorm=False), ValueError, "use_qknorm is False"),
    "no gate": (lambda f: change_setting(f, use_swiglu=False), ValueError, "use_swiglu is False"),
    "other norm": (lambda f: change_setting(f, use_rmsnorm=False), ValueError, "use_rmsnorm is False"),
    "other output": (lambda f: change_setting(f, out_channels=8), ValueError, "out_channels is 8; only 4"),
    "unknown setting": (lambda f: change_setting(f, rope_base=5), ValueError, r"unknown settings \['rope_base'\]"),
    "impossible setting": (lambda f: change_setting(f, num_heads=5), ValueError, "num_heads 5 does not divide"),
    "other depth": (lambda f: change_setting(f, depth=4), ValueError, "missing tensors .*blocks_3"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(folder, case):
    damage, error, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(error, match=message):
        load_official(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        load_official(tmp_path / "nowhere")


def test_dropout_of_the_encoder_is_refused(tmp_path):
    folder = unpack_artifact("mae_pixel", tmp_path)
    change_setting(folder, dropout_prob=0.1)
    with pytest.raises(ValueError, match="dropout_prob is 0.1; only 0.0"):
        load_official(folder)
