"""training.averages and training.sharding on one process: the recursion, the flag, weights that come back."""

import pytest
import torch
from torch import nn

from drift_accel.training import averages as averages_module
from drift_accel.training.averages import AverageConfig, WeightAverages, average_name
from drift_accel.training.sharding import model_of, require_same_shapes, skeleton


def model_at(value: float) -> nn.Linear:
    model = nn.Linear(3, 2).double()
    move(model, value)
    return model


def move(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("chunk", [1, 2**25])
def test_each_average_follows_its_own_recursion(chunk, monkeypatch):
    monkeypatch.setattr(averages_module, "UPDATE_CHUNK", chunk)
    model = model_at(1.0)
    averages = WeightAverages(model, (0.0, 0.9, 0.9999))
    wanted = dict.fromkeys(averages.averages, 1.0)
    for value in (2.0, -3.0, 5.0):
        move(model, value)
        averages.update(model)
        wanted = {decay: decay * average + (1 - decay) * value for decay, average in wanted.items()}
    for decay, average in averages.averages.items():
        assert average.keys() == {"weight", "bias"}
        for tensor in average.values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, wanted[decay]), rtol=1e-14, atol=0)


def test_a_step_that_did_not_happen_moves_no_average():
    model = model_at(1.0)
    averages = WeightAverages(model, (0.9,))
    move(model, 2.0)
    averages.update(model, torch.ones(()))
    assert averages.averages[0.9]["weight"].unique().tolist() == [1.0]
    averages.update(model, torch.zeros(()))
    assert averages.averages[0.9]["weight"].unique().tolist() == [pytest.approx(1.1)]


def test_the_model_gets_its_own_weights_back_also_after_an_error():
    model = model_at(1.0)
    averages = WeightAverages(model, (0.9,))
    move(model, 2.0)
    with pytest.raises(RuntimeError), averages.applied_to(model, 0.9) as applied:
        assert applied is model and model.weight.unique().item() == 1.0
        raise RuntimeError
    assert model.weight.unique().item() == 2.0


def test_weights_that_do_not_fit_are_refused():
    averages = WeightAverages(model_at(1.0), (0.9,))
    with pytest.raises(ValueError, match="the average 0.9 does not fit the model: bias is missing; other is unknown"):
        averages.load(0.9, {"weight": torch.zeros(2, 3), "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"here: a is missing; b is missing; c is missing and 1 more"):
        require_same_shapes({name: torch.zeros(1) for name in "abcd"}, {}, "here")


def test_a_skeleton_takes_no_memory_and_carries_settings():
    model = model_at(1.0)
    model.setting = [1, 2]
    bones = skeleton(model)
    assert all(parameter.device.type == "meta" for parameter in bones.parameters()) and bones.setting == [1, 2]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    whole = model_of(bones, weights)
    assert whole.weight.data_ptr() == model.weight.data_ptr() and type(whole) is nn.Linear
    assert all(parameter.device.type == "meta" for parameter in bones.parameters())


def test_names_and_decays():
    assert average_name(0.9998) == "ema_0.9998"
    with pytest.raises(ValueError, match="each once"):
        AverageConfig(decays=())
