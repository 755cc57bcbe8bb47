"""Device names, GPUs that are not there, and how CUDA_VISIBLE_DEVICES renumbers; without a GPU."""

import argparse
import os

import pytest
import torch
from PIL import Image
from tiny_runs import ROOT, TINY_MAE, run_tool

from drift_accel import train_mae
from drift_accel.foundation.devices import add_device_argument, check_device_name, find_device, pin_device


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are `count` GPUs."""
    chosen = []

    def pretend(count, visible=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Model {index}")
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return chosen

    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    return pretend


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_names_of_devices(name):
    check_device_name(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:0 ", "CUDA", "mps", "cuda:a"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or cuda:N"):
        check_device_name(name)


def test_devices_that_exist(gpus):
    gpus(2)
    found = {name: find_device(name) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:1")}
    assert {name: str(device) for name, device in found.items()} == {name: name.replace("auto", "cuda") for name in found}
    gpus(0)
    assert find_device("auto").type == find_device("cpu").type == "cpu"


def test_an_ordinal_that_does_not_exist_names_those_that_do(gpus):
    gpus(2)
    with pytest.raises(ValueError, match=r"'cuda:2' but there are only cuda:0 \(Model 0\), cuda:1 \(Model 1\)$"):
        find_device("cuda:2")
    gpus(2, visible="5, 3")
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES=5, 3 numbers them anew from 0: cuda:0 is GPU 5, cuda:1 is GPU 3"):
        find_device("cuda:5")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_no_gpu_at_all(gpus, name):
    gpus(0)
    with pytest.raises(ValueError, match="there is no GPU here: use cpu, or auto"):
        find_device(name)
    gpus(0, visible="")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is empty, which hides all of them"):
        find_device(name)


def test_a_training_process_is_bound_to_the_gpu_that_is_named(gpus):
    chosen = gpus(4)
    assert pin_device("cuda:3", 1) == torch.device("cuda:3")
    assert chosen == [torch.device("cuda:3")] and os.environ.pop("ACCELERATE_TORCH_DEVICE") == "cuda:3"
    for name in ("auto", "cpu", "cuda"):
        assert pin_device(name, 4) is None
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ and len(chosen) == 1
    with pytest.raises(ValueError, match="4 processes were launched, which would all use it"):
        pin_device("cuda:0", 4)


def test_the_trainers_stop_before_anything_is_written(gpus, tmp_path):
    gpus(1, visible="7")
    with pytest.raises(SystemExit, match=r"only cuda:0 \(Model 0\).*cuda:0 is GPU 7"):
        train_mae.main([*TINY_MAE, "--device", "cuda:1", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_tools_have_the_same_argument():
    parser = argparse.ArgumentParser()
    add_device_argument(parser)
    assert parser.parse_args([]).device == "auto"
    assert parser.parse_args(["--device", "cuda:1"]).device == "cuda:1"
    assert parser.parse_args(["--cpu"]).device == "cpu"
    assert "cuda:N" in parser.format_help()


TOOLS = {  # name: what it wants before the device is looked at
    "export_latents": ("--source", "pictures", "--output_dir", "unused", "--encoding", "uint8"),
    "sample": ("unused",),
    "benchmark_step": ("--config", ROOT / "train_configs/mae_digits.yaml", "--synthetic", "tiny"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_name_the_gpus_that_there_are(gpus, tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    gpus(2, visible="3,1")
    (tmp_path / "pictures/class").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/class/0.png")
    outcome = run_tool(name, *TOOLS[name], "--device", "cuda:2")
    assert "cuda:1 is GPU 1" in f"{outcome} {capsys.readouterr().err}"
