"""Samples of a UNet: each by its seed, index and label, however they are asked for."""

import numpy as np
import pytest
import torch
from edm_networks import TINY, random_network

from drift_accel.sampling.edm_samples import EdmPictures


def make(**options) -> EdmPictures:
    labels = options.pop("labels", np.arange(11) % 5)
    return EdmPictures(
        random_network(TINY, dtype=torch.float32), labels, **{"seed": 1, "weights_sha256": "a", "batch": 4, **options}
    )


def test_samples_are_one_step_and_do_not_depend_on_the_cut():
    pictures = make()
    whole = pictures.batch(range(11))
    parts = [pictures.batch(range(start, min(start + 3, 11))).model_space for start in range(0, 11, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.model_space)
    noise = torch.from_numpy(pictures.noise(range(11)))
    expected = random_network(TINY, dtype=torch.float32).generate(noise, torch.from_numpy(pictures.labels))
    np.testing.assert_allclose(whole.model_space, expected, rtol=1e-4, atol=1e-4)
    assert whole.pixels.shape == (11, 8, 8, 3) and whole.non_finite == 0
    assert not np.array_equal(make(seed=2).batch(range(2)).model_space, whole.model_space[:2])
    assert pictures.identity() != make(seed=2).identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [5]}, "labels reach from 5 to 5: the UNet has 0 to 4"),
        ({"labels": []}, "at least one label"),
        ({"batch": 0}, "is 0"),
    ],
)
def test_impossible_samples_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
