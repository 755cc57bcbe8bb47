"""The diffusers pipeline: round trip, class names, output types, latents."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import call_tool, write_export

from drift_accel import DriftPipeline, Generator
from drift_accel.sampling import decode_latents, generate, load_trained, open_decoder

NAMES = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "crane", 3: "crane", 4: "Golden Retriever"}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the generator's initial output layer is zero
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=random))
    return model


def make_generator(channels: int) -> Generator:
    return fill(
        Generator(
            input_size=8, in_channels=channels, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5,
            num_style_tokens=3, style_codebook_size=5, num_context_tokens=2,
        )
    )  # fmt: skip


def make_vae(**options) -> AutoencoderKL:
    return fill(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, **options)).eval()


@pytest.fixture(scope="module")
def pipeline() -> DriftPipeline:
    return DriftPipeline(make_generator(3), id2label=NAMES)


def test_output_types_and_ranges(pipeline):
    images = pipeline([0, 1, 4], seed=1, output_type="pt").images
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert images.min() >= 0.0 and images.max() <= 1.0 and images.std() > 0.01
    raw = generate(pipeline.generator, [0, 1, 4], guidance_scale=1.0, seed=1)
    torch.testing.assert_close(images, (raw / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    arrays = pipeline([0, 1, 4], seed=1, output_type="np").images
    assert np.array_equal(arrays, images.permute(0, 2, 3, 1).numpy())
    pictures, *rest = pipeline([0, 1, 4], seed=1, return_dict=False)
    assert not rest and [picture.size for picture in pictures] == [(8, 8)] * 3
    assert np.array_equal(np.asarray(pictures[2]), (arrays[2] * 255).round().astype(np.uint8))


def test_a_grey_generator_gives_grey_pictures():
    pictures = DriftPipeline(make_generator(1))(2, seed=0).images
    assert pictures[0].mode == "L"


def test_round_trip_keeps_weights_samples_and_names(pipeline, tmp_path):
    expected = pipeline(["goldfish", 0, 4], guidance_scale=1.5, seed=3, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    assert list((tmp_path / "generator").glob("*.safetensors"))
    loaded = DriftPipeline.from_pretrained(tmp_path)
    assert type(loaded.generator) is Generator and loaded.vae is None
    for name, value in pipeline.generator.state_dict().items():
        assert torch.equal(loaded.generator.state_dict()[name], value), name
    assert loaded.config.id2label == pipeline.config.id2label
    assert torch.equal(loaded(["goldfish", 0, 4], guidance_scale=1.5, seed=3, output_type="pt").images, expected)


def test_round_trip_with_a_vae_in_a_fresh_process(tmp_path):
    pipeline = DriftPipeline(make_generator(4), make_vae())
    expected = pipeline([1, 2], seed=5, output_type="np").images
    pipeline.save_pretrained(tmp_path / "saved")
    script = (
        "import sys, numpy; from drift_accel import DriftPipeline\n"
        "pipeline = DriftPipeline.from_pretrained(sys.argv[1])\n"
        "numpy.save(sys.argv[2], pipeline([1, 2], seed=5, output_type='np').images)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "images.npy")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Thread counts of the two processes may differ, so that rounding may too.
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "undo"),
    [
        ({"scaling_factor": 0.5}, lambda z: z / 0.5),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, lambda z: z / 0.5 + 0.25),
        ({"scaling_factor": 0.5, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, lambda z: z * 3.0 / 0.5 + 1.0),
    ],
    ids=["scale", "scale and shift", "per channel"],
)
def test_latents_are_decoded_by_the_vaes_own_scaling(options, undo):
    pipeline = DriftPipeline(make_generator(4), make_vae(**options))
    latents = pipeline([1, 2, 3], seed=5, output_type="latent", batch_size=2).images
    images = pipeline([1, 2, 3], seed=5, output_type="pt", batch_size=2).images
    with torch.no_grad():
        expected = pipeline.vae.decode(undo(latents)).sample
    assert images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_decoding_does_not_depend_on_the_other_images():
    vae, latents = make_vae(), torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = decode_latents(vae, latents, chunk=2)
    assert whole.shape == (5, 3, 8, 8) and not whole.is_inference()
    assert torch.equal(decode_latents(vae, latents[4:], chunk=2), whole[4:])
    assert decode_latents(vae, latents[:0]).shape[0] == 0
    with pytest.raises(ValueError, match="latents must be .N, 4, h, w."):
        decode_latents(vae, latents[:, :3])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        decode_latents(vae, latents, chunk=0)


def test_seeds(pipeline):
    def sample(labels=(1, 1), **options):
        return pipeline(list(labels), output_type="pt", **options).images

    before = torch.get_rng_state()
    first = sample(seed=1)
    assert torch.equal(first, sample(seed=1)) and not torch.equal(first[0], first[1])
    assert torch.equal(first[:1], sample([1], seed=1))  # image i does not depend on how many follow
    assert not torch.equal(first, sample(seed=2))
    assert not torch.equal(sample(), sample())
    drawn = [sample(generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*drawn)
    advancing = torch.Generator().manual_seed(9)
    assert not torch.equal(sample(generator=advancing), sample(generator=advancing))
    torch.testing.assert_close(sample(seed=1, batch_size=3), first, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="both seed and generator"):
        sample(seed=1, generator=advancing)
    with pytest.raises(ValueError, match="must be a torch.Generator"):
        sample(generator=[advancing, advancing])


def test_class_names(pipeline):
    assert pipeline.get_label_ids(["Goldfish", "carassius  auratus", "golden retriever", 3]) == [1, 1, 4, 3]
    assert pipeline.get_label_ids("tench, tinca tinca") == [0]
    assert pipeline.get_label_ids(torch.tensor([2, 0])) == [2, 0]
    assert pipeline.get_label_ids(np.array([2, 0])) == [2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("goldfsh", "class 'goldfsh' is unknown; did you mean 'goldfish'"),
        ("xyzzy", "class 'xyzzy' is unknown; see the names in pipeline.config.id2label"),
        ("crane", r"several classes, \[2, 3\]"),
        (5, r"class label 5 is outside \[0, 5\)"),
        ([1, -1], "class label -1"),
        (1.5, "class label 1.5 is neither an integer nor a name"),
    ],
)
def test_unknown_classes_are_refused(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        pipeline(labels)


def test_class_names_and_labels_mix(pipeline):
    images = pipeline(class_labels=["golden retriever", 2], guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2


def test_a_trained_model_becomes_a_pipeline_with_its_provenance_and_card(tmp_path):
    export = write_export(tmp_path / "export")
    (export / "provenance.json").write_text(json.dumps({"identity": {"data": "abc"}, "sessions": [{"command": ["train.py"]}]}))
    pipeline = DriftPipeline.from_trained(load_trained(export))
    pipeline.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and 'class_labels=["tench", 3]' in card
    assert "train.py" in card and pipeline.provenance["origin"]["weights_sha256"] in card and "- 1: goldfish" in card
    loaded = DriftPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.provenance["training"]["identity"] == {"data": "abc"}
    assert loaded.get_label_ids(["tinca tinca", "goldfish"]) == [0, 1]
    (tmp_path / "saved/README.md").write_text("mine")
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "mine"
    latents = load_trained(write_export(tmp_path / "latents", channels=4))
    with pytest.raises(ValueError, match="makes latents: give their VAE"):
        DriftPipeline.from_trained(latents)
    make_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    assert DriftPipeline.from_trained(latents, open_decoder(latents, str(tmp_path / "vae")))("goldfish", seed=0).images
    other = load_trained(write_export(tmp_path / "other", channels=4, scale=2.0, shift=0.0))
    with pytest.raises(ValueError, match="not those of the VAE's configuration"):
        DriftPipeline.from_trained(other, open_decoder(other, str(tmp_path / "vae")))


def test_the_hub_tool_writes_the_folder_and_sends_nothing_on_a_dry_run(tmp_path, monkeypatch):
    write_export(tmp_path / "export")
    command = (tmp_path / "export", "--output_dir", tmp_path / "pipe", "--repo_id", "me/model")
    printed = call_tool("push_to_hub", *command, "--dry_run")
    assert "dry run: nothing was sent to me/model" in printed and "generator/diffusion_pytorch_model.safetensors" in printed
    assert DriftPipeline.from_pretrained(tmp_path / "pipe")("goldfish", seed=0).images
    assert "add --overwrite" in call_tool("push_to_hub", *command, "--dry_run", status=2)
    sent = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{name}", lambda self, *given, name=name, **options: sent.append((name, options))
        )
    call_tool("push_to_hub", *command, "--overwrite")
    assert [name for name, _ in sent] == ["create_repo", "upload_folder"] and sent[1][1]["folder_path"] == tmp_path / "pipe"


def test_other_refusals(pipeline):
    with pytest.raises(ValueError, match="output_type is 'jpg'; choose one of pil, np, pt, latent"):
        pipeline(1, output_type="jpg")
    with pytest.raises(ValueError, match="makes latents of 4 channels; give the pipeline a vae"):
        DriftPipeline(make_generator(4))(1)
    with pytest.raises(ValueError, match="has no id2label"):
        DriftPipeline(make_generator(3))("goldfish")
    with pytest.raises(ValueError, match="VAE has 4 latent channels but the generator makes 3"):
        DriftPipeline(make_generator(3), make_vae())
    with pytest.raises(ValueError, match="class label 5 is outside"):
        DriftPipeline(make_generator(3), id2label={5: "six"})
