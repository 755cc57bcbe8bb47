"""Generators from exports, pipelines, runs, checkpoints and official folders, and what is refused."""

from pathlib import Path

import pytest
import torch
from golden_files import unpack_artifact
from tiny_models import CLASSES, tiny_generator, tiny_vae, write_encoder, write_export, write_run

from drift_accel import DriftPipeline
from drift_accel.data.row_encoders import weights_hash
from drift_accel.sampling import generate, load_trained, open_decoder
from drift_accel.sampling.trained import is_model


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with two checkpoints, two averages and an export."""
    write_export(write_run(tmp_path / "run") / "exports/ema_0.9")
    return tmp_path / "run"


def first_weight(trained) -> float:
    return next(trained.generator.parameters()).flatten()[0].item()


def test_a_finished_run_gives_its_export_with_its_classes(run):
    trained = load_trained(run)
    assert trained.origin["kind"] == "export" and trained.origin["ema"] == "ema_0.9" and trained.origin["step"] == 20
    assert trained.origin["run"] == str(run) and trained.origin["weights_sha256"] == weights_hash(tiny_generator())
    assert trained.table.by_name("goldfish").index == 1 and not trained.makes_latents
    assert not trained.generator.training and not next(trained.generator.parameters()).requires_grad


@pytest.mark.parametrize(
    ("options", "offset", "step"),
    [
        ({"step": "latest"}, 0.12, 20),
        ({"step": 10}, 0.11, 10),
        ({"step": "10", "ema": "0.99"}, 0.21, 10),
        ({"step": "10", "ema": "ema_0.99"}, 0.21, 10),
        ({"ema": "none"}, 0.02, 20),
        ({"ema": "0.99"}, 0.22, 20),
    ],
)
def test_checkpoints_and_averages_are_chosen(run, options, offset, step):
    trained = load_trained(run, **options)
    assert first_weight(trained) == pytest.approx(next(tiny_generator().parameters()).flatten()[0].item() + offset, abs=1e-6)
    assert trained.origin["step"] == step and trained.origin["kind"] == "checkpoint"
    assert trained.table.by_name("goldfish").index == 1  # from the export beside it


def test_a_checkpoint_folder_itself(run):
    trained = load_trained(run / "checkpoints/step_00000010", ema="none")
    assert trained.origin["step"] == 10 and trained.origin["ema"] == "none"


def test_an_unfinished_run_gives_its_newest_checkpoint_not_an_export_on_the_way(run):
    (run / "exports/ema_0.9").rename(run / "exports/ema_0.9_step_00000010")
    assert load_trained(run).origin["kind"] == "checkpoint" and load_trained(run).origin["step"] == 20
    assert load_trained(run, export="ema_0.9_step_00000010").origin["step"] == 10


def test_export_and_checkpoint_give_the_same_bits(run, tmp_path):
    from_checkpoint = load_trained(run, step=10)
    from_checkpoint.generator.save_pretrained(tmp_path / "again")
    from_export = load_trained(tmp_path / "again")
    images = [generate(t.generator, [0, 1, 2], guidance_scale=1.5, seed=3) for t in (from_checkpoint, from_export)]
    assert torch.equal(*images)
    assert from_checkpoint.origin["weights_sha256"] == from_export.origin["weights_sha256"]


def test_official_folders_and_pipelines(tmp_path):
    assert load_trained(unpack_artifact("generator", tmp_path)).origin["kind"] == "official"
    DriftPipeline(tiny_generator(4), tiny_vae(), id2label={i: name for i, (_, name) in enumerate(CLASSES)}).save_pretrained(
        tmp_path / "pipe"
    )
    trained = load_trained(tmp_path / "pipe")
    assert trained.makes_latents and trained.table.by_name("goldfish").index == 1
    assert open_decoder(trained).name == str(tmp_path / "pipe/vae")


def test_what_a_folder_is_not(run, tmp_path):
    def refused(path, message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            load_trained(path, **options)

    refused(tmp_path / "nowhere", "is no folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no model: a run has config.yaml", FileNotFoundError)
    refused(write_encoder(tmp_path / "mae"), "holds a MaskedAutoencoder: give the folder of a Generator")
    refused(unpack_artifact("mae", tmp_path / "official"), "holds a MaskedAutoencoder: give the folder of a generator")
    refused(run, "has no checkpoint of step 15: it has 10, 20", step=15)
    refused(run, "give a number of steps or 'latest'", step="first")
    refused(run, "has no average 0.5: it has ema_0.9, ema_0.99, or 'none'", ema="0.5")
    refused(run, "give a decay such as 0.999", ema="fast")
    refused(run, "leave out --step and --ema", export="ema_0.9", step=10)
    refused(run / "exports/ema_0.9", "is no run, so --step chooses nothing", step=10)
    (run / "checkpoints/step_00000020/model.safetensors").write_bytes(b"damaged")
    refused(run, "step_00000020 is damaged", step=20)
    assert load_trained(run, step="latest").origin["step"] == 10
    (run / "config.yaml").write_text("mae: {}\n")
    refused(run, "is a run of another trainer")


def test_models_are_told_from_pictures(run, tmp_path):
    assert is_model(run) and is_model(run / "exports/ema_0.9") and is_model(run / "checkpoints/step_00000010")
    assert not is_model(tmp_path) and not is_model(tmp_path / "nowhere")


def test_the_vae_of_the_training_latents_is_found_and_others_are_refused(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    recorded = {"name": str(tmp_path / "vae"), "weights_sha256": weights_hash(vae)}
    trained = load_trained(write_export(tmp_path / "export", channels=4, vae=recorded, scale=2.0, shift=0.5))
    decoder = open_decoder(trained)
    assert decoder.weights_sha256 == weights_hash(vae) and decoder.scaling == (2.0, 0.5)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents / 2.0 + 0.5).sample
    torch.testing.assert_close(decoder(latents), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(decoder(latents)[2:], decoder(latents[2:], first_index=2))
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the VAE that the training latents were made with"):
        open_decoder(trained, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="--vae_batch is 0"):
        open_decoder(trained, batch=0)
    with pytest.raises(ValueError, match="--vae_dtype is 'int8'"):
        open_decoder(trained, dtype="int8")
    pixels = load_trained(write_export(tmp_path / "pixels"))
    assert open_decoder(pixels) is None
    with pytest.raises(ValueError, match="makes pixels, not latents: leave --vae out"):
        open_decoder(pixels, "digits")
    gone = load_trained(write_export(tmp_path / "gone", channels=4, vae={"name": "some/vae"}))
    with pytest.raises(ValueError, match="name their VAE with --vae .they were made with some/vae."):
        open_decoder(gone)


def test_the_vaes_own_scaling_needs_no_other(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    trained = load_trained(
        write_export(tmp_path / "export", channels=4, vae={"name": str(tmp_path / "vae")}, scale=0.5, shift=0.0)
    )
    assert open_decoder(trained).scaling is None
