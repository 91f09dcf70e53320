"""Inference with the deploy form: fused, planned and compiled ahead of time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..conv import bf16
from ..net.fusion import check_deploy_params, to_deploy
from ..net.layout import in_channels_of
from ..net.model import RepVGG, channel_hint, checked_dtype
from ..preprocess import Preprocessing, height_and_width, normalize
from ..processes import check_not_forked
from ..trees import flatten
from .plan import Plan
from .planned_net import Output, compile_net, planned_forward, prepare_params
from .tuning import choose_plan


@dataclasses.dataclass(frozen=True)
class PreparedNet:
    """A net prepared for batches of one size, to be compiled by a `Predictor`.

    Attributes:
      params: parameters of `forward`, on the device.
      forward: `(params, normalised images [batch_size, *image_shape]) -> [batch_size, outputs]`, ready for `jax.jit`.
      batch_size: images per call.
      image_shape: `(height, width, channels)`.
      output: kind of output.
      plan: plan with each layer's algorithm; None if all layers use the same one.
      integer: whether native code computes the body in 8-bit integers.
    """

    params: Mapping[str, Any]
    forward: Callable[[Mapping[str, Any], jax.Array], jax.Array]
    batch_size: int
    image_shape: tuple[int, int, int]
    output: Output
    plan: Plan | None = None
    integer: bool = False


class SelfContainedNet(Protocol):
    """A net that contains its parameters and prepares itself: `repvgg_jax.QuantizedNet`."""

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the net's images."""
        ...

    def prepared(self, batch_size: int, image_size: tuple[int, int], output: Output) -> PreparedNet:
        """Return the net prepared for a predictor; `image_size` is (height, width)."""
        ...


class Predictor:
    """A compiled net that maps images to logits or embeddings. Can be called from several threads at once.

    Attributes:
      plan: plan with each layer's algorithm; `print(predict.plan)` shows it as a table. None for a quantised net, in
        which all layers use the same algorithm.
      batch_size: images per compiled call.
      image_shape: `(height, width, channels)`.
      image_dtype: uint8 if the predictor normalises the images, else float32.
      integer: whether native code computes the body in 8-bit integers.
      output: "logits", or "embedding" for the output of `RepVGG.embed`.
    """

    def __init__(self, net: PreparedNet, preprocessing: Preprocessing | None = None):
        self.plan = net.plan
        self.output: Output = net.output
        self.batch_size = net.batch_size
        self.image_shape = net.image_shape
        self.image_dtype = np.dtype(np.float32 if preprocessing is None else np.uint8)
        self.integer = net.integer

        def run(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
            if preprocessing is not None:
                images = normalize(images, preprocessing)
            return net.forward(params, images).astype(jnp.float32)

        self._batch = jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), self.image_dtype)
        self._compiled, self._params = compile_net(jax.default_backend(), run, net.params, self._batch)

    def __call__(self, images: Any) -> np.ndarray:
        """Return the net's output for any number of images.

        Args:
          images: `[N, H, W, C]` for any N >= 1, NumPy or JAX: float and normalised, or uint8 in 0..255 if the
            predictor was made with `preprocessing`. Fewer than `batch_size` images are padded with blank images, and
            more are processed in pieces. Neither causes a recompilation.

        Returns:
          Logits `[N, num_classes]` or embeddings `[N, C]`, float32.

        Raises:
          ValueError: the batch is empty, or has the wrong shape or dtype.
          RepVGGError: the process was forked from one that had used JAX.
        """
        # Start all pieces before waiting for the first result.
        outputs = [np.asarray(result)[:count] for result, count in self._start_pieces(images)]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def start(self, images: Any) -> jax.Array:
        """Start computing the output and return without waiting for it, so that the caller can keep the device busy.

        Arguments and errors are those of `__call__`.

        Returns:
          The output of `__call__`, as an array on the device.
        """
        outputs = [result[:count] if count < len(result) else result for result, count in self._start_pieces(images)]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)

    def _start_pieces(self, images: Any) -> list[tuple[jax.Array, int]]:
        """Start computing all pieces; return the output of each, and the number of its images that are not padding."""
        check_not_forked()
        if not isinstance(images, jax.Array):
            images = np.asarray(images)
        self._check(images)
        if images.dtype != self.image_dtype:
            images = images.astype(self.image_dtype)
        if len(images) == self.batch_size:  # slicing would be an operation on the device, even for the whole array
            return [(self._run(images), self.batch_size)]
        return [self._piece(images[i : i + self.batch_size]) for i in range(0, len(images), self.batch_size)]

    def __reduce__(self) -> Any:
        raise TypeError(
            "a predictor is compiled code of this process, which cannot be pickled or copied; hand the weight file's "
            "path to the other process, and call load_weights and make_predictor there"
        )

    def _piece(self, images: Any) -> tuple[jax.Array, int]:
        count = len(images)
        if count < self.batch_size:
            full = np.zeros((self.batch_size, *self.image_shape), self.image_dtype)
            full[:count] = images
            images = full
        return self._run(images), count

    def _run(self, images: Any) -> jax.Array:
        with jax.disable_jit(False):  # compiled code cannot be called with jit disabled
            return self._compiled(self._params, images)

    def _check(self, images: Any) -> None:
        height, width, channels = self.image_shape
        if images.ndim != 4 or images.shape[1:] != self.image_shape or not len(images):
            empty = "; the batch is empty" if images.shape[:1] == (0,) else ""
            shape = f"[N, {height}, {width}, {channels}]"
            hint = channel_hint(images.shape, channels)
            raise ValueError(f"images must have shape {shape}, not {list(images.shape)}{empty}{hint}")
        if self.image_dtype == np.uint8 and images.dtype != np.uint8:
            raise ValueError(f"this predictor normalises uint8 images itself; these are {images.dtype}")
        if self.image_dtype != np.uint8 and images.dtype == np.uint8:
            raise ValueError("images are uint8: normalise them, or make the predictor with preprocessing")


def make_predictor(
    model: RepVGG | SelfContainedNet | None = None,
    variables: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    *,
    dtype: Any = None,
    tune: bool = False,
    preprocessing: Preprocessing | None = None,
    quantized: SelfContainedNet | None = None,
    output: Output = "logits",
) -> Predictor:
    """Return a compiled function from images to logits or embeddings.

    The net is fused, an algorithm is chosen for each layer, and the net is compiled once for one input shape.
    Compilation uses JAX's persistent cache if it is configured (`jax_compilation_cache_dir`).

    Args:
      model: training form (fused here) or deploy form; or a quantised net, for which `dtype` and `tune` have no effect.
      variables: variables of `model`; None for a quantised net, which contains them.
      batch_size: size of the compiled batch. Smaller batches are padded, and larger ones are processed in pieces.
      image_size: size in pixels, one number or (height, width). If None, the variant's published size, or the size in
        a quantised net's preprocessing.
      dtype: computation dtype of the body, such as `jnp.bfloat16`; the model's dtype if None. A CPU without AMX
        computes in float32 with weights rounded to bfloat16 where that is faster.
      tune: measure the algorithms on this machine (CPU, float32; a minute or two) instead of using the cost model.
        The result is saved in the user's cache folder and reused without measuring again.
      preprocessing: if set, the predictor accepts uint8 images and normalises them on the device, with this mean and
        standard deviation.
      quantized: a quantised net, as an alternative to passing it as `model`.
      output: "logits", or "embedding" for the pooled features that feed the classifier (`RepVGG.embed`).

    Returns:
      A `Predictor`: `predict(images)` maps `[N, H, W, C]` to `[N, num_classes]` (embeddings: `[N,
      variant.widths[-1]]`), float32, for any N >= 1.

    Raises:
      ValueError: a size is not positive, the output or dtype is unknown, the preprocessing has another number of
        channels, or there is not exactly one net.
      FusionError: `variables` cannot be fused.
      WeightsError: `variables` do not fit the model.
      RepVGGError: the process was forked from one that had used JAX.
    """
    check_not_forked()
    if output not in get_args(Output):
        raise ValueError(f"output must be one of {', '.join(get_args(Output))}, not {output!r}")
    net = model if quantized is None else quantized
    if net is None or (variables is None) == isinstance(net, RepVGG) or (model is not None and net is not model):
        raise ValueError("give model and variables, or quantized alone")
    if isinstance(net, RepVGG):
        assert variables is not None
        image_size = _checked_size(batch_size, net.variant.image_size if image_size is None else image_size)
        model, params = _deployed(net if dtype is None else net.clone(dtype=checked_dtype("dtype", dtype)), variables)
        channels = in_channels_of(flatten({"params": params}))
        _check_channels(channels, preprocessing)
        if model.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and not bf16.pays_on_cpu():
            model, params = widened(model, params)
        plan = choose_plan(model, batch_size, image_size, channels, tune=tune)
        return Predictor(planned_net(model, params, plan, output), preprocessing)
    image_size = _checked_size(batch_size, net.preprocessing.image_size if image_size is None else image_size)
    _check_channels(net.in_channels, preprocessing)
    return Predictor(net.prepared(batch_size, image_size, output), preprocessing)


def planned_net(model: RepVGG, params: Mapping[str, Any], plan: Plan, output: Output = "logits") -> PreparedNet:
    """Return a deploy-form net prepared for computation by `plan`.

    Args:
      model: deploy form, whose `dtype` is the computation dtype.
      params: parameters of `model`.
      plan: plan for this model.
      output: kind of output.
    """
    stem = plan.stages[0].layers[0].shape
    return PreparedNet(
        prepare_params(params, plan, model.dtype),
        planned_forward(model, plan, output),
        plan.batch_size,
        (stem.height, stem.width, stem.in_channels),
        output,
        plan,
    )


def widened(model: RepVGG, params: Mapping[str, Any]) -> tuple[RepVGG, Mapping[str, Any]]:
    """Return a deploy-form net that computes in float32 with weights rounded to the model's dtype."""
    body = {
        name: jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(model.dtype).astype(jnp.float32), block)
        for name, block in params.items()
        if name != "linear"
    }
    return model.clone(dtype=jnp.float32), {**params, **body}


def _deployed(model: RepVGG, variables: Mapping[str, Any]) -> tuple[RepVGG, Mapping[str, Any]]:
    """Return the deploy form and its parameters."""
    if not model.deploy:
        model, variables = to_deploy(model, variables)
        return model, variables["params"]
    params = variables.get("params", {})
    check_deploy_params(model, params)
    return model, params


def _checked_size(batch_size: int, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width after checking all sizes."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    return height_and_width(image_size)


def _check_channels(channels: int, preprocessing: Preprocessing | None) -> None:
    if preprocessing is not None and preprocessing.channels != channels:
        raise ValueError(f"the net takes {channels} channels, the preprocessing gives {preprocessing.channels}")
