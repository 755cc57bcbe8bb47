"""The encoder's training step against values recorded from the official release: loss, its parts, and the gradient's norm."""

import pytest
import torch
from golden_files import assert_norm_close, channels_first, load_arrays, unpack_artifact

from drift_accel.data import LabelledImages
from drift_accel.models import load_official
from drift_accel.training.mae_task import ClassifierConfig, MaeBatch, MaeTask


@pytest.mark.parametrize("name", ["mae", "mae_pixel"])
@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (99, 0.1)])
def test_the_task_computes_the_releases_loss_and_gradient(name, step, weight, tmp_path):
    golden, model = load_arrays(name), load_official(unpack_artifact(name, tmp_path))
    images, labels = channels_first(golden["x_bhwc"]), golden["label"]
    source = LabelledImages(images.numpy(), labels.numpy(), [str(k) for k in range(model.config.num_classes)])
    task = MaeTask(
        model, source, batch_size=len(labels), mask_ratio=0.5, total_steps=100, seed=0, device=torch.device("cpu"),
        classifier=ClassifierConfig(steps=50, weight=0.1, warmup_steps=10),
    )  # fmt: skip
    (batch,) = task.split(task.transfer(MaeBatch(images, labels, channels_first(golden["mask"]))))
    loss, metrics = task.compute(model, batch, step, diagnostics=False)
    prefix = f"lambda{weight}/"
    assert_norm_close(loss, golden[prefix + "loss"].mean(), 2e-5, "loss")
    for ours, theirs in (("reconstruction", "recon_loss"), ("classification", "cls_loss"), ("accuracy", "accuracy")):
        assert_norm_close(metrics[ours], golden[prefix + theirs].mean(), 2e-5, ours)
    if prefix + "grad_global_norm" in golden:
        loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        assert_norm_close(norm, golden[prefix + "grad_global_norm"], 2e-5, "gradient norm")
