"""Claim: a quantised file is a quarter of the float one's size, loads unchanged, and is never taken for one."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import repvgg_jax as rv
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images


@pytest.fixture
def files(tmp_path):
    """A float file and a quantised file of the same net, and the quantised net."""
    model, variables = deploy_net()
    net = rv.quantize(model, variables, images(), "naive", class_names=tuple("abcdefghij"))
    rv.save_weights(tmp_path / "float.safetensors", model, variables)
    rv.save_quantized(tmp_path / "int8.safetensors", net)
    return tmp_path / "float.safetensors", tmp_path / "int8.safetensors", net


@pytest.mark.parametrize("name", VARIANTS)
def test_a_net_loads_unchanged(name, tmp_path):
    net = rv.quantize(*deploy_net(name), images(), "per-channel", float_first=True, float_last=name == "grouped")
    rv.save_quantized(tmp_path / "int8.safetensors", net)
    again = rv.load_quantized(tmp_path / "int8.safetensors")
    for field in ("variant", "num_classes", "in_channels", "preprocessing", "class_names"):
        assert getattr(again, field) == getattr(net, field)
    jax.tree.map(np.testing.assert_array_equal, net.params, again.params)
    assert [leaf.dtype for leaf in jax.tree.leaves(again.params)] == [
        leaf.dtype for leaf in jax.tree.leaves(net.params)
    ]


def test_a_quantised_file_is_a_quarter_of_the_float_files_size(tmp_path):
    model = rv.create_model("RepVGG-A0", 1000, deploy=True)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), shapes)
    rv.save_weights(tmp_path / "float.safetensors", model, variables)
    rv.save_quantized(tmp_path / "int8.safetensors", rv.quantize(model, variables, images(8), "per-channel"))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] / sizes[1] < 0.255


def test_a_file_describes_itself(files):
    info = rv.inspect_weights(files[1])
    assert (info.quantized, info.deploy, info.dtype, info.num_classes) == (True, True, "int8", 10)
    assert info.num_parameters == rv.inspect_weights(files[0]).num_parameters
    assert not rv.inspect_weights(files[0]).quantized


def test_neither_kind_of_file_is_taken_for_the_other(files):
    floats, integers, _ = files
    with pytest.raises(rv.WeightsError, match=r"holds a quantised net \(INT8\), and float weights are needed here"):
        rv.load_weights(integers)
    with pytest.raises(rv.WeightsError, match="holds float32 weights, not a quantised net; make one with"):
        rv.load_quantized(floats)
    with pytest.raises(rv.WeightsError, match="holds custom, not RepVGG-A0"):
        rv.load_quantized(integers, "RepVGG-A0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("params/stage1_0/bias"), "missing: params/stage1_0/bias"),
        (lambda a: a.update({"params/extra": np.zeros(3, np.float32)}), "unexpected: params/extra"),
        (lambda a: a.update({"params/pool/input_scale": np.ones(2, np.float32)}), r"params/pool/input_scale is \[2\]"),
        (lambda a: a.update({"params/linear/bias": np.zeros(10, np.int8)}), "has int8 values, not int32"),
        (lambda a: a.update({"params/stage0/kernel_scale": -np.ones(16, np.float32)}), "scales that are not positive"),
        (lambda a: a.update({"params/stage0/input_scale": np.float32(np.nan)}), "NaN or infinite"),
    ],
)
def test_a_damaged_file_is_refused(change, words, files, tmp_path):
    arrays = load_file(files[1])
    change(arrays)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    save_file(arrays, tmp_path / "bad.safetensors", metadata=_metadata(files[1]))
    with pytest.raises(rv.WeightsError, match=words):
        rv.load_quantized(tmp_path / "bad.safetensors")


def _metadata(path) -> dict[str, str]:
    """Return a file's metadata without checksums, so that only a check of the values can find the damage."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        native = json.loads(json.loads(file.read(length))["__metadata__"]["repvgg_jax"])
    del native["crc32"]
    return {"repvgg_jax": json.dumps(native)}


def test_other_suffixes_are_refused(files, tmp_path):
    with pytest.raises(rv.WeightsError, match=r"quantised nets are \.safetensors files"):
        rv.save_quantized(tmp_path / "int8.pth", files[2])


def test_a_predictor_accepts_a_quantised_net(files):
    _, path, net = files
    predict = rv.make_predictor(quantized=rv.load_quantized(path), batch_size=4)
    x = images(6, seed=1)
    np.testing.assert_allclose(predict(x), net(x), rtol=1e-5, atol=1e-5)
    assert type(predict) is type(rv.make_predictor(*deploy_net(), image_size=32))
    assert predict.plan is None
    np.testing.assert_array_equal(rv.make_predictor(net, batch_size=4)(x), predict(x))
    with pytest.raises(ValueError, match="give model and variables, or quantized"):
        rv.make_predictor(net, net.variables)
    with pytest.raises(ValueError, match="give model and variables, or quantized"):
        rv.make_predictor(deploy_net()[0])
    with pytest.raises(ValueError, match="give model and variables, or quantized"):
        rv.make_predictor()
    with pytest.raises(ValueError, match="give model and variables, or quantized"):
        rv.make_predictor(*deploy_net(), quantized=net)
