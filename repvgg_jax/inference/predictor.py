"""Deploy inference: fused, planned, compiled ahead of time, called with arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..conv import native
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
    """A net made ready for batches of one size, to be compiled by a `Predictor`.

    Attributes:
      params: what `forward` takes, on the device.
      forward: `(params, normalised images [batch_size, *image_shape]) -> [batch_size, outputs]`, to be jitted.
      batch_size: images a call takes.
      image_shape: `(height, width, channels)`.
      output: what comes out.
      plan: which algorithm computes each layer; None where all are computed alike.
      integer: whether the body computes in 8-bit integers, natively.
    """

    params: Mapping[str, Any]
    forward: Callable[[Mapping[str, Any], jax.Array], jax.Array]
    batch_size: int
    image_shape: tuple[int, int, int]
    output: Output
    plan: Plan | None = None
    integer: bool = False


class SelfContainedNet(Protocol):
    """A net that has its parameters with it, and prepares itself: `repvgg_jax.QuantizedNet`."""

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared for it."""
        ...

    def prepared(self, batch_size: int, image_size: tuple[int, int], output: Output) -> PreparedNet:
        """Return what a predictor compiles; `image_size` is (height, width)."""
        ...


class Predictor:
    """A compiled net: call it with images, get logits or embeddings. Safe to call from several threads at once.

    Attributes:
      plan: which algorithm computes each layer, `print(predict.plan)` shows a table; None for a quantised net, whose
        layers are all computed alike.
      batch_size: images a compiled call takes.
      image_shape: `(height, width, channels)`.
      image_dtype: uint8 where normalisation is folded in, else float32.
      integer: whether the body computes in 8-bit integers, natively.
      output: "logits", or "embedding": what `RepVGG.embed` returns.
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

        batch = jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), self.image_dtype)
        self._compiled, self._params = compile_net(jax.default_backend(), run, net.params, batch)

    def __call__(self, images: Any) -> np.ndarray:
        """Return the net's output for any number of images.

        Args:
          images: `[N, H, W, C]` for any N >= 1, NumPy or JAX: float and normalised, or uint8 in 0..255 if the
            predictor was made with `preprocessing`. Fewer than `batch_size` are padded with blank images, more
            run in pieces; neither compiles again.

        Returns:
          `[N, num_classes]`, or embeddings `[N, C]`, float32.

        Raises:
          ValueError: an empty batch, another shape, or the other kind of numbers.
          RepVGGError: the process was forked from one that had used JAX.
        """
        # All pieces are on their way before the first result is waited for.
        outputs = [np.asarray(result)[:count] for result, count in self._start_pieces(images)]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def start(self, images: Any) -> jax.Array:
        """Start computing the output and return without waiting for it, so that a caller can keep the device busy.

        Args and raises as for a call.

        Returns:
          What a call returns, on the device.
        """
        outputs = [result[:count] if count < len(result) else result for result, count in self._start_pieces(images)]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)

    def _start_pieces(self, images: Any) -> list[tuple[jax.Array, int]]:
        """Outputs of `batch_size` images each, not waited for, and how many of them count."""
        check_not_forked()
        if not isinstance(images, jax.Array):
            images = np.asarray(images)
        self._check(images)
        if images.dtype != self.image_dtype:
            images = images.astype(self.image_dtype)
        if len(images) == self.batch_size:  # even a slice that takes everything would be an operation on the device
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
        with jax.disable_jit(False):  # compiled code cannot be called otherwise
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
    """A function from images to logits or embeddings: the net fused, its layers planned, compiled once for one shape.

    Compilation goes through JAX's persistent cache where one is configured (`jax_compilation_cache_dir`).

    Args:
      model: training form (fused here) or deploy form; or a quantised net, in which `dtype` and `tune` have no say.
      variables: its variables; a quantised net has them with it.
      batch_size: the compiled batch; smaller ones are padded, larger ones run in pieces.
      image_size: pixels, one number or (height, width); if None, the variant's published size, or what a quantised
        net's preprocessing says.
      dtype: computation dtype of the body, such as `jnp.bfloat16`; the model's own if None. A CPU that has no products
        of bfloat16 computes in float32 on weights rounded to it, which is faster there.
      tune: measure the algorithms on this machine (CPU, float32; a minute or two) instead of asking the cost model.
        The result is kept in the user's cache folder and used again without measuring.
      preprocessing: take uint8 images and normalise them with its mean and standard deviation, on the device.
      quantized: a quantised net, the same as giving it for `model`.
      output: "logits", or "embedding" for the pooled features that the classifier would read (`RepVGG.embed`).

    Returns:
      A `Predictor`: `predict(images)`, `[N, H, W, C] -> [N, num_classes]` (embeddings: `[N, variant.widths[-1]]`)
      float32, for any N >= 1.

    Raises:
      ValueError: a non-positive size, an unknown output, a dtype that is none, a preprocessing for another number of
        channels, or not exactly one net.
      FusionError, WeightsError: `variables` cannot be fused, or are another model's.
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
        if model.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and not native.bf16_available():
            model, params = widened(model, params)
        channels = in_channels_of(flatten({"params": params}))
        _check_channels(channels, preprocessing)
        plan = choose_plan(model, batch_size, image_size, channels, tune=tune)
        return Predictor(planned_net(model, params, plan, output), preprocessing)
    image_size = _checked_size(batch_size, net.preprocessing.image_size if image_size is None else image_size)
    _check_channels(net.in_channels, preprocessing)
    return Predictor(net.prepared(batch_size, image_size, output), preprocessing)


def planned_net(model: RepVGG, params: Mapping[str, Any], plan: Plan, output: Output = "logits") -> PreparedNet:
    """Return a deploy-form net made ready to be computed as `plan` says.

    Args:
      model: deploy form, its `dtype` that of the computation.
      params: its parameters.
      plan: chosen for this model.
      output: what is to come out.
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
    """Return a deploy-form net that computes in float32 on weights rounded to its own dtype."""
    body = {
        name: jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(model.dtype).astype(jnp.float32), block)
        for name, block in params.items()
        if name != "linear"
    }
    return model.clone(dtype=jnp.float32), {**params, **body}


def _deployed(model: RepVGG, variables: Mapping[str, Any]) -> tuple[RepVGG, Mapping[str, Any]]:
    """The deploy form and its parameters."""
    if not model.deploy:
        model, variables = to_deploy(model, variables)
        return model, variables["params"]
    params = variables.get("params", {})
    check_deploy_params(model, params)
    return model, params


def _checked_size(batch_size: int, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    return height_and_width(image_size)


def _check_channels(channels: int, preprocessing: Preprocessing | None) -> None:
    if preprocessing is not None and preprocessing.channels != channels:
        raise ValueError(f"the net takes {channels} channels, the preprocessing gives {preprocessing.channels}")
