"""Claim: files of earlier releases load, and a file of a later release is refused with that release's name.

`files/` holds files of release 0.1.0, before stages had their own strides: a net with every option of that release.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

import repvgg_jax as rv
from repvgg_jax.version import __version__
from repvgg_jax.weights import header
from tests.helpers.random_weights import random_variables

FILES = Path(__file__).parent / "files"
IMAGES = np.linspace(-1, 1, 2 * 32 * 32 * 3, dtype=np.float32).reshape(2, 32, 32, 3)
LOGITS = [
    [-4.190155506134033, 0.24242518842220306, -1.4777796268463135],
    [-0.5422484874725342, 0.04830321669578552, 0.05917717516422272],
]
"""Logits of the training form, as computed by that release."""
INT8_LOGITS = [
    [-0.034581203013658524, 0.02581896260380745, -0.16758570075035095],
    [-0.03707345202565193, 0.023662984371185303, -0.16831007599830627],
]
VARIANT = rv.Variant(
    (1, 2, 1, 1),
    (4, 4, 4, 4, 8),
    groups=2,
    squeeze_excite="before_relu",
    squeeze_excite_ratio=4,
    name="made of everything",
    image_size=32,
    crop_fraction=0.9,
    strides=(1, 2, 2, 2, 2),
    output_stride=16,
    activation="silu",
    block="qarepvgg",
    branches=rv.Branches(2, True, True),
    epsilon=1e-3,
)


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_a_file_of_release_0_1_0_gives_the_same_net(form):
    path = FILES / f"release_0_1_0_{form}.safetensors"
    model, variables = rv.load_weights(path)
    assert model == rv.RepVGG(VARIANT, 3, deploy=form == "deploy")
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES), LOGITS, rtol=1e-4, atol=1e-5)
    info = rv.inspect_weights(path)
    assert info.class_names == ("a", "b", "c")
    assert info.preprocessing == rv.Preprocessing(32, 0.9, (0.5,) * 3, (0.25,) * 3)


def test_a_quantised_file_of_release_0_1_0_gives_the_same_net():
    net = rv.load_quantized(FILES / "release_0_1_0_int8.safetensors")
    assert net.variant == rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8), strides=(1, 2, 2, 2, 2))
    np.testing.assert_allclose(net(IMAGES), INT8_LOGITS, rtol=1e-5, atol=1e-6)


def described(path: Path) -> dict:
    """Return what a native file says about itself."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["repvgg_jax"])


def test_default_fields_are_omitted_and_the_release_is_written(tmp_path):
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8), branches=rv.Branches(point=False)), 3)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    fields = described(tmp_path / "w.safetensors")
    assert fields["release"] == __version__
    assert fields["variant"] == {"num_blocks": [1] * 4, "widths": [4] * 4 + [8], "branches": {"point": False}}
    assert rv.load_weights(tmp_path / "w.safetensors")[0] == model


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((), "licence"),
        (("variant",), "depth"),
        (("variant", "branches"), "seven"),
        (("preprocessing",), "interpolation"),
    ],
    ids=str,
)
def test_a_field_of_a_later_release_is_named_with_that_release(place, name, tmp_path, monkeypatch):
    to_json = header.Header.to_json

    def later(self) -> dict[str, Any]:
        fields: dict[str, Any] = to_json(self) | {"release": "9.8.7"}
        fields["variant"]["branches"] = {"point": False}
        inner: Any = fields
        for key in place:
            inner = inner[key]
        inner[name] = 3
        return fields

    monkeypatch.setattr(header.Header, "to_json", later)
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8), branches=rv.Branches(point=False)), 3)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    with pytest.raises(rv.WeightsError) as refusal:
        rv.load_weights(tmp_path / "w.safetensors")
    assert str(refusal.value) == (
        f"{tmp_path / 'w.safetensors'} has fields that this release ({__version__}) does not know: {name}; "
        "it was written by release 9.8.7 of repvgg-jax"
    )
