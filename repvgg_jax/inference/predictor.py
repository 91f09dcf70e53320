"""Deploy inference: fused, planned, compiled ahead of time, called with arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..net.fusion import check_deploy_params, to_deploy
from ..net.layout import in_channels_of
from ..net.model import RepVGG, channel_hint, checked_dtype
from ..preprocess import Preprocessing, height_and_width, normalize
from ..processes import check_not_forked
from ..trees import flatten
from .plan import Plan
from .planned_net import Output, compile_for, planned_forward, prepare_params
from .planning import choose_plan

if TYPE_CHECKING:
    from ..quantization import QuantizedNet


class Predictor:
    """A compiled net: call it with images, get logits or embeddings. Safe to call from several threads at once.

    Attributes:
      plan: which algorithm computes each layer; `print(predict.plan)` shows a table.
      batch_size: images a compiled call takes.
      image_shape: `(height, width, channels)`.
      image_dtype: uint8 where normalisation is folded in, else float32.
      integer: whether the body computes in 8-bit integers, natively.
      output: "logits", or "embedding": what `RepVGG.embed` returns.
    """

    integer = False

    def __init__(
        self,
        model: RepVGG,
        params: Mapping[str, Any],
        plan: Plan,
        preprocessing: Preprocessing | None,
        output: Output = "logits",
    ):
        stem = plan.stages[0].layers[0].shape
        self.plan = plan
        self.output: Output = output
        self.batch_size = plan.batch_size
        self.image_shape = (stem.height, stem.width, stem.in_channels)
        self.image_dtype = np.dtype(np.float32 if preprocessing is None else np.uint8)
        self._params = prepare_params(params, plan, model.dtype)
        forward = planned_forward(model, plan, output)

        def run(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
            if preprocessing is not None:
                images = normalize(images, preprocessing)
            return forward(params, images).astype(jnp.float32)

        batch = jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), self.image_dtype)
        self._compiled = compile_for(jax.default_backend(), run, self._params, batch)

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
    model: RepVGG | None = None,
    variables: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
    *,
    dtype: Any = None,
    tune: bool = False,
    preprocessing: Preprocessing | None = None,
    quantized: "QuantizedNet | None" = None,
    output: Output = "logits",
) -> Predictor:
    """A function from images to logits or embeddings: the net fused, its layers planned, compiled once for one shape.

    Compilation goes through JAX's persistent cache where one is configured (`jax_compilation_cache_dir`).

    Args:
      model: training form (fused here) or deploy form.
      variables: its variables.
      batch_size: the compiled batch; smaller ones are padded, larger ones run in pieces.
      image_size: pixels, one number or (height, width); the variant's published size if None.
      dtype: computation dtype of the body, such as `jnp.bfloat16`; the model's own if None.
      tune: measure the algorithms on this machine (CPU, float32; a minute or two) instead of asking the cost model.
        The result is kept in the user's cache folder and used again without measuring.
      preprocessing: take uint8 images and normalise them with its mean and standard deviation, on the device.
      quantized: a quantised net, in place of `model` and `variables`; `dtype` and `tune` have no say in it.
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
    if quantized is not None and model is None and variables is None:
        from ..quantization.predictor import QuantizedPredictor

        size = _checked_size(batch_size, quantized.preprocessing.image_size if image_size is None else image_size)
        _check_channels(quantized.in_channels, preprocessing)
        return QuantizedPredictor(quantized, batch_size, size, preprocessing, output)
    if quantized is not None or model is None or variables is None:
        raise ValueError("give model and variables, or quantized")
    height, width = _checked_size(batch_size, model.variant.image_size if image_size is None else image_size)
    if dtype is not None:
        model = model.clone(dtype=checked_dtype("dtype", dtype))
    if model.deploy:
        params = variables.get("params", {})
        check_deploy_params(model, params)
    else:
        model, variables = to_deploy(model, variables)
        params = variables["params"]
    channels = in_channels_of(flatten({"params": params}))
    _check_channels(channels, preprocessing)
    plan = choose_plan(model, batch_size, (height, width), channels, tune=tune)
    return Predictor(model, params, plan, preprocessing, output)


def _checked_size(batch_size: int, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    return height_and_width(image_size)


def _check_channels(channels: int, preprocessing: Preprocessing | None) -> None:
    if preprocessing is not None and preprocessing.channels != channels:
        raise ValueError(f"the net takes {channels} channels, the preprocessing gives {preprocessing.channels}")
