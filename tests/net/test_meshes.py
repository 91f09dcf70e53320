"""Claim: both forms compute the same on every kind of mesh, and lower for accelerators that this machine lacks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import repvgg_jax as rv
from repvgg_jax.trees import flatten
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import compiled
from tests.helpers.random_weights import random_variables

MODEL = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 8, 8, 8, 8), groups=2), 5)
BRANCHES = rv.create_model(
    rv.Variant((1, 2, 1, 1), (4, 4, 4, 4, 4), squeeze_excite="after_relu", branches=rv.Branches(2, True, True)), 5
)
VARIABLES = random_variables(MODEL)
IMAGES = np.random.default_rng(0).normal(size=(8, 20, 24, 3)).astype(np.float32)


def everything(model: rv.RepVGG, variables: Any, images: Any) -> dict[str, Any]:
    """Return the logits of both forms, the loss's gradient, and the running statistics afterwards."""

    def loss(params: Any) -> Any:
        logits, changed = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.square(logits).sum(), changed["batch_stats"]

    gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
    deploy_model, deploy_variables = rv.to_deploy(model, variables)
    logits = {"training": model.apply(variables, images), "deploy": deploy_model.apply(deploy_variables, images)}
    return {"logits": logits, "gradients": gradients, "batch_stats": stats}


@functools.cache
def reference(start: int = 0, stop: int = len(IMAGES)) -> dict[str, Any]:
    """Return `everything` on one device, without a mesh."""
    images = IMAGES[start:stop]
    return jax.tree.map(
        np.asarray, compiled(functools.partial(everything, MODEL), VARIABLES, images)(VARIABLES, images)
    )


def check(expected: Any, actual: Any) -> None:
    expected, actual = flatten(expected), flatten(actual)
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        assert relative_difference(values, actual[name]) < 1e-3, name


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (AxisType.Explicit, 4),
        pytest.param(AxisType.Explicit, 1, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, 4, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_jit_on_a_mesh_equals_jit_without(kind, count):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        images = jax.device_put(IMAGES, NamedSharding(mesh, P("data")))
        variables = jax.device_put(VARIABLES, NamedSharding(mesh, P()))
        actual = compiled(functools.partial(everything, MODEL), variables, images)(variables, images)
        assert actual["logits"]["deploy"].sharding.spec == P("data", None) or kind == AxisType.Auto
    check(reference(), actual)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_gradients_in_shard_map_with_varying_axes_checked(count):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    # A parameter that all devices share gets the sum of their gradients; each device keeps its own statistics.
    specs = {"logits": P("data"), "gradients": P(), "batch_stats": P("data")}

    def each(variables: Any, images: Any) -> dict[str, Any]:
        actual = everything(MODEL, variables, images)
        return actual | {"batch_stats": jax.tree.map(lambda leaf: leaf[None], actual["batch_stats"])}

    shards = jax.shard_map(each, mesh=mesh, in_specs=(P(), P("data")), out_specs=specs)
    actual = jax.tree.map(np.asarray, compiled(shards, VARIABLES, IMAGES)(VARIABLES, IMAGES))
    share = len(IMAGES) // count
    parts = [reference(start, start + share) for start in range(0, len(IMAGES), share)]
    gradients = jax.tree.map(lambda *leaves: sum(leaves), *(part["gradients"] for part in parts))
    check(gradients, actual["gradients"])
    stats = jax.tree.map(lambda *leaves: np.stack(leaves), *(part["batch_stats"] for part in parts))
    check(stats, actual["batch_stats"])
    logits = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part["logits"] for part in parts))
    check(logits, actual["logits"])


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow), "shard_map"], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_branch_can_be_lowered(dtype, kind):
    model = BRANCHES.clone(dtype=jnp.dtype(dtype))
    variables = random_variables(model)
    function = functools.partial(everything, model)
    if kind == "shard_map":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"logits": P("data"), "gradients": P(), "batch_stats": P("data")}

        def each(variables: Any, images: Any) -> Any:
            results = everything(model, variables, images)
            return results | {"batch_stats": jax.tree.map(lambda leaf: leaf[None], results["batch_stats"])}

        jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(P(), P("data")), out_specs=specs)).lower(variables, IMAGES)
        return
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        images = jax.device_put(IMAGES, NamedSharding(mesh, P("data")))
        jax.jit(function).lower(jax.device_put(variables, NamedSharding(mesh, P())), images)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_both_forms_lower_for_accelerators(platform):
    exported = jax.export.export(jax.jit(functools.partial(everything, MODEL)), platforms=(platform,))(
        VARIABLES, IMAGES
    )
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text
    assert "@repvgg_" not in text  # no call of native code
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        images = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype, sharding=NamedSharding(mesh, P("data")))
        variables = jax.device_put(VARIABLES, NamedSharding(mesh, P()))  # a plain Flax convolution needs this, too
        function = jax.jit(functools.partial(everything, MODEL))
        assert jax.export.export(function, platforms=(platform,))(variables, images).nr_devices == 4
