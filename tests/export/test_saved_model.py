"""Claim: a SavedModel gives the net's logits in TensorFlow; without TensorFlow, one line says what to install."""

from unittest import mock

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.export.deploy_net import InputLayout
from repvgg_jax.files import atomic_folder
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables

GATED = rv.Variant((1, 2, 2, 1), (8, 8, 12, 16, 20), groups=4, squeeze_excite="after_relu", squeeze_excite_ratio=4)


@pytest.fixture
def net():
    model = rv.create_model(GATED, num_classes=5)
    return model, random_variables(model)


def test_tensorflow_gives_the_same_logits(net, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    model, variables = net
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    layouts: dict[InputLayout, np.ndarray] = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2)}
    for layout, batch in layouts.items():
        rv.export_saved_model(tmp_path / layout, model, variables, image_size=32, input_layout=layout)
        signature = tf.saved_model.load(str(tmp_path / layout)).signatures["serving_default"]
        for count in (1, 3):
            actual = signature(images=tf.constant(batch[:count]))["logits"].numpy()
            assert relative_difference(expected[:count], actual) <= 1e-5


def test_without_tensorflow_one_line_says_what_to_install(net, tmp_path):
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(rv.ExportError, match="needs TensorFlow: pip install tensorflow") as caught,
    ):
        rv.export_saved_model(tmp_path / "net.savedmodel", *net)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "net.savedmodel"
    with pytest.raises(rv.RepVGGError, match="No such file"), atomic_folder(target) as folder:
        (folder / "half" / "a file").write_text("", encoding="utf-8")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "whole").write_text("", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    with pytest.raises(rv.RepVGGError, match="exists already"), atomic_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]
