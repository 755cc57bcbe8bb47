"""The extraction: what the model sees is what the sources say, the same however it is run, and odd input is named."""

import json
import sys

import numpy as np
import pytest
import torch
from edm_networks import TINY, random_network
from PIL import Image
from small_activation_sets import files_of
from small_caches import small_header, write_small_cache
from tiny_models import CLASSES, call_tool, tiny_generator, write_encoder, write_export
from tiny_runs import run_tool
from torch import nn

from drift_accel.analysis.activations.extraction import ActivationExtraction, ExtractionConfig
from drift_accel.analysis.activations.models import EncoderModel, GeneratorModel
from drift_accel.analysis.activations.opening import model_kind, open_real_source
from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.data.crops import ImageCrop
from drift_accel.data.digits import load_digits
from drift_accel.data.latent_export import Workers
from drift_accel.models.exports import load_export
from drift_accel.models.generator import patchify
from drift_accel.models.masked_autoencoder import MaskedAutoencoder
from drift_accel.sampling import generate, load_trained
from drift_accel.sampling.draws import sample_styles

LAYERS = ("conv1", "layer2_blk1", "encoder.stages.1.blocks.0.norm1")
QUIET = {"log": lambda message: None}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "mae")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("generator") / "export")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "labels.json"
    path.write_text(json.dumps({str(index): entry for index, entry in enumerate(CLASSES)}))
    return path


def extract(*arguments: object, fails: str | None = None) -> None:
    """Run the command in this process; `fails`: the text that it must end with."""
    status = run_tool("extract_activations", *arguments, "--cpu")
    if fails is None:
        assert status == 0, status
    else:
        assert fails in str(status), status


def write_pictures(root, classes=CLASSES, per_class: int = 3, side: int = 8, mode: str = "RGB"):
    """Class folders of pictures that differ."""
    stream = np.random.Generator(np.random.Philox(key=1))
    for key, _ in classes:
        (root / key).mkdir(parents=True)
        for number in range(per_class):
            pixels = stream.integers(256, size=(side + number, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / key / f"{number}.png")
    return root


def digits_extraction(folder, encoder, *, items=None, name="real", **config) -> ActivationExtraction:
    """The digits' test split through the tiny encoder."""
    model = EncoderModel(load_export(encoder, MaskedAutoencoder), {"kind": "mae"}, "cpu")
    items = np.arange(70) if items is None else items
    return ActivationExtraction(folder, name, open_real_source("digits"), items, model, ExtractionConfig(layers=LAYERS, **config))


def test_pooled_and_whole_maps_are_the_encoders(tmp_path, encoder):
    digits, items = load_digits("test"), np.arange(0, 300, 7)
    network = load_export(encoder, MaskedAutoencoder).eval()
    seen = {}
    handle = network.encoder.stages[1].blocks[0].norm1.register_forward_hook(lambda *args: seen.update(hooked=args[2]))
    with torch.no_grad():
        maps = network.feature_maps(torch.from_numpy(digits.rows(items)))
    handle.remove()
    expected = {"conv1": maps["conv1"], "layer2_blk1": maps["layer2_blk1"], LAYERS[2]: seen["hooked"]}
    for pooled in (True, False):
        digits_extraction(tmp_path / str(pooled), encoder, items=items, pooled=pooled).run(**QUIET)
        opened = ActivationSet.open(tmp_path / str(pooled), "real")
        for layer, values in expected.items():
            wanted = values.mean(dim=(2, 3)) if pooled else values
            assert opened.layers[layer] == tuple(wanted.shape[1:])
            np.testing.assert_allclose(opened.rows(layer), wanted.flatten(1).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(opened.labels, digits.labels[items])
    picture = np.asarray(Image.open(opened.sample(5)["image_path"]), dtype=np.float32)
    np.testing.assert_allclose(picture / 127.5 - 1, digits.rows(items[5:6])[0, 0], atol=0.5 / 127.5 + 1e-6)
    assert opened.metadata["model"]["weights_sha256"] and opened.metadata["full_shapes"]["conv1"] == [8, 8, 8]


@pytest.mark.parametrize("storage", ["arrow", "npz"])
def test_processes_file_sizes_and_interruptions_do_not_change_a_bit(storage, tmp_path, encoder, monkeypatch):
    options = {"storage": storage, "model_batch": 16}
    digits_extraction(tmp_path / "whole", encoder, batch_size=20, **options).run(**QUIET)
    shared = tmp_path / "shared"
    with monkeypatch.context() as patch:  # two processes, one after the other, each killed before the set is finished
        patch.setattr("drift_accel.analysis.activations.staging.StagedSet._finish", lambda *_: None)
        for index in (1, 0):
            (shared / "activations/real.in_progress").mkdir(parents=True, exist_ok=True)
            digits_extraction(shared, encoder, batch_size=20, **options).run(workers=Workers(index=index, count=2), **QUIET)
    digits_extraction(shared, encoder, batch_size=20, **options).run(**QUIET)
    assert files_of(shared) == files_of(tmp_path / "whole")
    digits_extraction(tmp_path / "other", encoder, batch_size=29, **options).run(**QUIET)
    ours, theirs = (ActivationSet.open(tmp_path / name, "real") for name in ("whole", "other"))
    for layer in LAYERS:
        np.testing.assert_array_equal(ours.rows(layer), theirs.rows(layer))
    assert [s["original_path"] for s in ours.samples(range(70))] == [s["original_path"] for s in theirs.samples(range(70))]


def test_a_generators_layers_on_images_and_on_its_own_noise(tmp_path, generator):
    options = ("--layers", "blocks.0,final_layer", "--maps", "--name", "g", "--num_samples", 70, "--seed", 3)
    extract(generator, *options, "--guidance_scale", 1.5, "--output_dir", tmp_path / "images")
    extract(generator, *options, "--guidance_scale", 1.5, "--feed", "noise", "--output_dir", tmp_path / "noise")
    labels = torch.arange(70) % 4
    images = generate(load_trained(generator).generator, labels, guidance_scale=1.5, seed=3)
    noise = ActivationSet.open(tmp_path / "noise", "g")
    # The last layer of the pass from noise is the image itself, in patches (row, column, channel) of 2 x 2.
    patches = noise.rows("final_layer").reshape(70, 4, 4, 4)  # [N, patch, rows, columns]
    folded = patches.reshape(70, 2, 2, 4, 4).transpose(0, 3, 1, 4, 2).reshape(70, 1, 8, 8)
    np.testing.assert_array_equal(folded, images.numpy())
    seen = {}
    network = tiny_generator()
    network.blocks[0].register_forward_hook(lambda *args: seen.update(block=args[2]))
    with torch.no_grad():
        network(images, labels, torch.full((70,), 1.5), sample_styles(network.config, 3, range(70)))
    fed = ActivationSet.open(tmp_path / "images", "g")
    assert fed.layers["blocks.0"] == (16, 1, 17)
    np.testing.assert_allclose(fed.rows("blocks.0").reshape(70, 16, 17), seen["block"].transpose(1, 2), rtol=1e-3, atol=1e-4)
    assert fed.sample(5)["synset_id"] == CLASSES[1][0] and fed.class_names()[0] == "tench, Tinca tinca"


def test_a_unet_on_real_pictures_and_on_its_own_noise(tmp_path, table):
    network = random_network(TINY, dtype=torch.float32)
    network.save_pretrained(tmp_path / "unet")
    root = write_pictures(tmp_path / "pictures", side=12)
    run = ("--output_dir", tmp_path / "out", "--model_batch", 4, "--maps", "--layers", "encoder_bottleneck,midblock,enc.8x8_conv")
    extract(root, "--model", tmp_path / "unet", *run, "--name", "real", "--class_table", table)
    crop = ImageCrop(kind="lanczos", size=8)
    source = open_real_source(str(root), crop=crop)
    pixels = np.stack([crop(source.source.load(index)) for index in range(12)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    one_hot = nn.functional.one_hot(torch.arange(12) // 3, TINY["num_classes"]).float()
    real = ActivationSet.open(tmp_path / "out", "real")
    expected = network.feature_maps(80.0 * images / 80.0, ["encoder_bottleneck", "midblock"], labels=one_hot, sigma=80.0)
    for name, values in expected.items():
        np.testing.assert_allclose(real.rows(name), values.flatten(1), rtol=1e-3, atol=1e-4)
    assert real.metadata["model"]["sigma"] == 80.0 and "LANCZOS" in " ".join(real.metadata["preprocessing"]).upper()

    extract(tmp_path / "unet", *run, "--name", "fake", "--num_samples", 6, "--feed", "noise", "--classes", "1,3")
    extract(tmp_path / "unet", *run, "--name", "hooked", "--num_samples", 6, "--feed", "noise", "--classes", "1,3", "--layers",
            "midblock,dec.4x4_in0.norm0")  # fmt: skip
    fake, hooked = (ActivationSet.open(tmp_path / "out", name) for name in ("fake", "hooked"))
    assert fake.labels.tolist() == [1, 3] * 3
    np.testing.assert_allclose(hooked.rows("midblock"), fake.rows("midblock"), rtol=1e-4, atol=1e-5)
    extract(root, "--model", tmp_path / "unet", *run, "--name", "x", "--sigma", 81, fails="--sigma is 81.0")
    extract(root, "--model", tmp_path / "unet", *run, "--name", "x", "--sigma", 0, fails="--sigma is 0.0")
    extract(root, "--model", tmp_path / "unet", *run, "--name", "x/y", fails="--name is 'x/y'")
    extract(tmp_path / "unet", *run, "--name", "x", "--num_samples", 2, "--ema", 0.9, fails="--ema does not apply to samples of")


def test_layers_are_listed_and_unknown_ones_refused(tmp_path, encoder, generator):
    printed = call_tool("extract_activations", "--model", encoder, "--list_layers", "--cpu")
    assert "layer3 " in printed and "encoder.stages.0.blocks.0.norm1" in printed and "32 x 2 x 2" in printed
    assert "blocks.0.attention.qkv" in call_tool("extract_activations", "--model", generator, "--list_layers", "--cpu")
    where = ("--output_dir", tmp_path, "--name", "x")
    extract("digits", "--model", encoder, *where, "--layers", "layer9", fails="no layer 'layer9'")
    extract("digits", "--model", encoder, *where, "--layers", "conv1,conv1", fails="name each layer once")
    extract(generator, *where, "--num_samples", 4, fails="name the layers of Generator with --layers")
    extract("digits", *where, "--layers", "conv1", fails="digits is no generator: name the model with --model")
    extract("digits", "--model", encoder, "--layers", "conv1", fails="give --output_dir and --name")
    extract("runs/nothing", *where, fails="runs/nothing does not exist")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_pictures_are_taken(mode, tmp_path, table):
    root = write_pictures(tmp_path / "pictures", mode="RGB", per_class=1)
    Image.open(root / CLASSES[0][0] / "0.png").convert(mode).save(root / CLASSES[0][0] / "0.jpg")
    (root / CLASSES[0][0] / "0.png").unlink()
    encoder = write_encoder(tmp_path / "mae", channels=3)
    common = ("--model", encoder, "--layers", "conv1", "--class_table", table, "--name", "real")
    extract(root, *common, "--output_dir", tmp_path / "out", "--images", "original")
    opened = ActivationSet.open(tmp_path / "out", "real")
    assert len(opened) == 4 and opened.sample(0)["image_path"].suffix == ".jpg"
    assert Image.open(opened.sample(0)["image_path"]).mode == mode
    assert opened.sample(1)["image_path"].read_bytes() == (root / CLASSES[1][0] / "0.png").read_bytes()


def test_broken_pictures_are_named_and_may_be_left_out(tmp_path, table):
    root = write_pictures(tmp_path / "pictures")
    good = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    good.save(root / CLASSES[1][0] / "broken.jpg")
    path = root / CLASSES[1][0] / "broken.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    encoder = write_encoder(tmp_path / "mae", channels=3)
    where = ("--output_dir", tmp_path / "out", "--name", "real")
    command = (root, "--model", encoder, "--layers", "conv1", "--class_table", table, *where)
    extract(*command, fails=f"1 pictures cannot be read, max_bad allows 0:\n  {root}: {CLASSES[1][0]}/broken.jpg")
    with pytest.raises(ValueError, match="not finished"):
        ActivationSet.open(tmp_path / "out", "real")
    extract(*command, "--max_bad", 1)
    opened = ActivationSet.open(tmp_path / "out", "real")
    assert len(opened) == 12 and np.bincount(opened.labels).tolist() == [3] * 4
    assert "broken.jpg" in opened.metadata["left_out"][0]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / CLASSES[0][0]).mkdir()
    (tmp_path / "all" / CLASSES[0][0] / "broken.jpg").write_bytes(whole[:200])
    extract(tmp_path / "all", *command[1:], "--overwrite", fails="none of the first 1 pictures can be read")


def test_repaired_pictures_come_in_when_the_command_is_given_again(tmp_path, table):
    root = write_pictures(tmp_path / "pictures")
    path = root / CLASSES[0][0] / "0.png"
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    encoder = write_encoder(tmp_path / "mae", channels=3)
    where = ("--output_dir", tmp_path / "out", "--name", "real", "--file_samples", 5)
    command = (root, "--model", encoder, "--layers", "conv1", "--class_table", table, *where)
    extract(*command, fails="cannot be read")
    path.write_bytes(whole)
    extract(*command)
    assert len(ActivationSet.open(tmp_path / "out", "real")) == 12


def test_classes_are_never_guessed(tmp_path, table, encoder, generator):
    root = write_pictures(tmp_path / "pictures", classes=CLASSES[:2])
    mae = write_encoder(tmp_path / "mae", channels=3)
    run = ("--layers", "conv1", "--output_dir", tmp_path / "out", "--name", "real")
    extract(root, "--model", mae, *run, fails="holds 2 of the 1000 synsets, which does not tell their labels")
    write_pictures(root, classes=[("n99999999", "")])
    extract(root, "--model", mae, *run, "--class_table", table, fails="unknown synset 'n99999999'")
    (root / "n99999999").rename(root / "misc")
    extract(root, "--model", mae, *run, "--class_table", table, fails="unknown class 'misc'")
    extract(root, "--model", mae, *run, fails=f"{root}/misc is named by no synset")
    own = write_pictures(tmp_path / "own", classes=[("cats", ""), ("dogs", "")])
    extract(own, "--model", mae, *run)
    assert ActivationSet.open(tmp_path / "out", "real").class_names() == {0: "cats", 1: "dogs"}
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(loose / "a.png")
    extract(loose, "--model", mae, "--layers", "conv1", "--output_dir", tmp_path / "out", "--name", "loose")
    opened = ActivationSet.open(tmp_path / "out", "loose")
    assert opened.labels.tolist() == [-1] and opened.class_names() == {} and opened.sample(0)["synset_id"] == ""
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(grey / "a.png")
    block = ("--layers", "blocks.0", "--output_dir", tmp_path / "out", "--name", "x")
    extract(grey, "--model", generator, *block, fails="a.png has no class, and the model takes one of its 4")
    (tmp_path / "empty").mkdir()
    extract(tmp_path / "empty", "--model", mae, *run, fails="holds no class folders and no pictures")
    extract(tmp_path / "nowhere", "--model", mae, *run, fails="does not exist")


def test_inputs_that_a_model_cannot_take_are_refused(tmp_path, encoder, generator):
    run = ("--layers", "conv1", "--output_dir", tmp_path / "out", "--name", "x")
    colour = write_pictures(tmp_path / "colour", classes=[("a", "")])
    extract(colour, "--model", encoder, *run, fails="takes images of 1 channels")
    write_small_cache(tmp_path / "cache")
    extract(tmp_path / "cache", "--model", encoder, *run, "--images", "none", fails="the model takes pictures")
    digits = tuple((str(label), f"digit {label}") for label in range(10))
    latents = write_export(tmp_path / "latents", channels=4, classes=digits, vae={"name": "unknown"})
    block = ("--layers", "blocks.0", "--output_dir", tmp_path / "out", "--name", "x")
    extract("digits", "--model", latents, *block, fails="the model takes latents of 4 channels, digits, test has pictures")
    extract("digits", "--model", generator, *block, fails="unknown class")
    mae = write_encoder(tmp_path / "mae", channels=3)
    extract(colour, "--model", mae, *run, "--image_size", 16, fails="takes images of 8 x 8")
    extract("digits", "--model", encoder, *run, "--images", "original", fails="has no files to copy")
    extract("digits", "--model", encoder, *run, "--feed", "noise", fails="--feed noise is for samples of a generator")
    extract(generator, *block, "--model", encoder, "--feed", "noise", "--num_samples", 3, fails="leave --model out")
    extract("digits", "--model", encoder, *run, "--image_size", 8, fails="--image_size does not apply to rows")
    extract(colour, "--model", mae, *run, "--vae", "digits", fails="--vae does not apply to pictures that exist")
    extract("digits", "--model", encoder, *run, "--model_step", 3, fails="--model_step does not belong to a model of kind mae")
    extract("digits", "--model", encoder, *run, "--sigma", 80, fails="--sigma does not belong to a model of kind mae")
    extract(
        "digits", "--model", encoder, *run, "--per_class", 1000, fails="has 55 samples, 1000 were asked for: ask for at most 48"
    )
    extract("digits", "--model", "nothing_here:make", *run, fails="would run nothing_here:make with all rights")


def test_a_cache_of_latents_goes_through_its_generator(tmp_path):
    rows = write_small_cache(tmp_path / "cache", small_header(image_shape=(2, 4, 4)))["latent"]
    generator = tiny_generator(2, 4, 3)
    generator.save_pretrained(tmp_path / "model")
    entries = [{"index": index, "id": f"n0{index}", "name": f"class {index}"} for index in range(3)]
    (tmp_path / "model/data.json").write_text(json.dumps({"kind": "latents", "classes": entries}))
    run = (
        "--layers",
        "patch_embedding",
        "--maps",
        "--output_dir",
        tmp_path / "out",
        "--name",
        "x",
        "--model",
        tmp_path / "model",
    )
    extract(tmp_path / "cache", *run, fails="name their VAE with --vae, or --images none")
    extract(tmp_path / "cache", *run, "--images", "none")
    opened = ActivationSet.open(tmp_path / "out", "x")
    patches = patchify(torch.from_numpy(rows.astype(np.float32)), 2)
    expected = generator.patch_embedding(patches).transpose(1, 2).flatten(1).detach().numpy()
    np.testing.assert_allclose(opened.rows("patch_embedding"), expected, rtol=1e-4, atol=1e-5)
    assert opened.labels.tolist() == [row % 3 for row in range(12)] and opened.sample(4)["original_path"] == "p4.png"


def test_selection_and_what_is_recorded_of_it(tmp_path, encoder):
    run = ("--model", encoder, "--layers", "conv1", "--output_dir", tmp_path, "--images", "none")
    extract("digits", *run, "--name", "a", "--per_class", 5, "--classes", "3,7", "--seed", 4)
    opened = ActivationSet.open(tmp_path, "a")
    assert np.bincount(opened.labels, minlength=10).tolist() == [0, 0, 0, 5, 0, 0, 0, 5, 0, 0]
    assert opened.metadata["selection"]["seed"] == 4 and opened.sample(0)["image_path"] is None
    extract("digits", *run, "--name", "b", "--num_samples", 25)
    counts = np.bincount(ActivationSet.open(tmp_path, "b").labels, minlength=10)
    assert counts.sum() == 25 and counts.max() - counts.min() == 1


def test_a_function_of_ones_own_runs_only_when_allowed(tmp_path, monkeypatch):
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    input_space, map_names, default_features, in_channels = 'pixel', ('edges',), ('edges',), 1\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.convolution = nn.Conv2d(1, 5, 3)\n"
        "        self.convolution.weight.data.fill_(0.1)\n"
        "    def feature_maps(self, images, names=None):\n"
        "        return {'edges': self.convolution(images)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = ("--model", "my_network:Net", "--output_dir", tmp_path / "out", "--name", "x", "--num_samples", 10)
    extract("digits", *run, fails="with all rights of this process")
    assert "my_network" not in sys.modules
    extract("digits", *run, "--run_code", "--layers", "edges,convolution", "--maps")
    opened = ActivationSet.open(tmp_path / "out", "x")
    assert opened.layers == {"edges": (5, 6, 6), "convolution": (5, 6, 6)}
    np.testing.assert_array_equal(opened.rows("edges"), opened.rows("convolution"))


@pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")
def test_an_encoder_of_pixels_sees_pictures_of_its_own_size(tmp_path, table):
    root = write_pictures(tmp_path / "pictures", side=40)
    resnet = ("--model", "none.pth", "--model_kind", "resnet", "--encoder", "random=true", "architecture=resnet18")
    resnet = (*resnet, "weights=supervised", "image_size=32")
    run = ("--layers", "layer2,network.conv1", "--output_dir", tmp_path / "out", "--name", "real", "--class_table", table)
    extract(root, *resnet, *run)
    opened = ActivationSet.open(tmp_path / "out", "real")
    assert opened.layers["layer2"] == (128,) and opened.metadata["model"]["network_input_size"] == 32
    assert Image.open(opened.sample(0)["image_path"]).size == (32, 32)
    extract(root, *resnet, "width=3", *run, fails="--encoder has 'width=3': write KEY=VALUE with a key among architecture")


def test_models_are_known_by_what_lies_there(tmp_path, encoder, generator):
    random_network(TINY, dtype=torch.float32).save_pretrained(tmp_path / "unet")
    found = [model_kind(str(path)) for path in (encoder, generator, tmp_path / "unet", "my_module:function")]
    assert found == ["mae", "generator", "edm", "code"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="name it with --model_kind"):
        model_kind(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_kind(str(tmp_path / "nowhere"))


def test_samples_of_a_tool_are_read_back_with_their_classes(tmp_path, generator):
    for output, form in (("folder", "folder"), ("samples.npz", "npz"), ("dataset", "dataset")):
        call_tool("sample", generator, "--output", tmp_path / output, "--format", form, "--classes", "1,3", "--per_class", 2)
        mae = write_encoder(tmp_path / f"mae_{form}", channels=1)
        run = ("--model", mae, "--layers", "conv1", "--output_dir", tmp_path / "out", "--name", form)
        extract(tmp_path / output, *run)
        assert sorted(ActivationSet.open(tmp_path / "out", form).labels.tolist()) == [1, 1, 3, 3], form


def test_settings_out_of_range_are_refused():
    for options, message in (
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"model_batch": 0}, "--model_batch is 0"),
        ({"max_bad": -1}, "--max_bad is -1"),
        ({"pictures": "all"}, "--images is 'all'"),
        ({"layers": ("a", "a")}, "name each layer once"),
        ({"layers": ("",)}, "--layers is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ExtractionConfig(**{"layers": ("a",), **options})
    with pytest.raises(ValueError, match="--guidance_scale is 0.5"):
        GeneratorModel(None, guidance_scale=0.5, seed=0, device="cpu")
