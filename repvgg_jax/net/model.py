"""RepVGG as a Flax linen module: stages, head, features."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from ..trees import flatten
from .activations import Activation
from .blocks import DeployBlock, RepVGGBlock
from .branches import BlockKind, Branches
from .kernel_algebra import BN_EPSILON
from .layers import ConvBN, Dtype, torch_bias_init, torch_kernel_init
from .layout import stem_kernel
from .variants import AUX_HEADS, Published, Variant, get_variant


def checked_dtype(name: str, value: Any) -> Any:
    """Return `value`, if it is a floating-point dtype; convert a string to the dtype that it names.

    Raises:
      ValueError: `value` is not a floating-point dtype.
    """
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point dtype such as float32 or bfloat16, not {value!r}")
    return dtype if isinstance(value, str) else value


def checked_count(name: str, value: Any) -> int:
    """Return `value`, if it is a positive whole number.

    Raises:
      ValueError: `value` is not a positive whole number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return int(value)


def channel_hint(shape: Sequence[int], channels: int) -> str:
    """Return advice to append to an error about images of shape `shape`, if their channels come first; else ""."""
    if len(shape) != 4 or shape[-1] == channels or shape[1] != channels:
        return ""
    return "; channels come last: transpose them from [N, C, H, W] to [N, H, W, C]"


class Linear(nn.Module):
    """Fully connected layer with PyTorch's default initialisation (`torch.nn.Linear`): `[N, C] -> [N, features]`."""

    features: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.Dense(
            self.features,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(x.shape[-1]),
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
        )
        nn.share_scope(self, dense)  # leaves are `linear/kernel`, not `linear/Dense_0/kernel`
        return dense(x)


def global_average_pool(x: Array, dtype: Dtype) -> Array:
    """Return the mean over height and width, `[N, H, W, C] -> [N, C]`, in `dtype`: float32 even in a bfloat16 net."""
    return x.astype(dtype).mean((1, 2))


class AuxiliaryHead(nn.Module):
    """RepVGGplus's classifier on an intermediate stage: 3x3 stride-2 conv+BN, ReLU, global average pool, linear."""

    num_classes: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype, epsilon=self.epsilon)
        conv_bn = ConvBN(x.shape[-1], 3, stride=2, **options)
        nn.share_scope(self, conv_bn)  # leaves are `stage1_aux/{conv,bn,linear}`
        x = nn.relu(conv_bn(x, train))
        return Linear(self.num_classes, self.param_dtype, name="linear")(global_average_pool(x, self.param_dtype))


class FeatureInfo(NamedTuple):
    """One output of `RepVGG.features`: its name, stride in input pixels, and channels."""

    name: str
    stride: int
    channels: int


class RepVGG(nn.Module):
    """RepVGG (paper section 3): the training form or, with `deploy=True`, the plain stack of 3x3 convolutions.

    Attributes:
      variant: the architecture.
      num_classes: width of the classifier.
      deploy: fused form; its parameters come from `to_deploy` or a deploy-form file.
      dtype: computation dtype of the body; head and logits use `param_dtype`.
      param_dtype: dtype of parameters and BN statistics (float32; float64 for numerical checks).
      remat: recompute each block's activations in the backward pass (`jax.checkpoint`; the authors'
        `use_checkpoint`): less memory, about a third more compute.
      frozen_stages: number of stages, counted from the first of the five, that do not change in training: they use
        running statistics instead of the batch's and get no gradient.
      frozen_bn: use running statistics in all blocks while training, without updating them (`norm_eval`); gammas and
        betas are still trained.
      dropout: fraction of the pooled features dropped before the classifier in training; needs an rng called
        "dropout".
    """

    variant: Variant
    num_classes: int = 1000
    deploy: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False
    frozen_stages: int = 0
    frozen_bn: bool = False
    dropout: float = 0.0

    # A subclass may replace these by training-time modules with the same parameters.
    training_block = RepVGGBlock
    classifier = Linear

    def setup(self):
        variant = self.variant
        block_class: Any = DeployBlock if self.deploy else self.training_block
        if self.remat:
            block_class = nn.remat(block_class, static_argnums=(2,))
        for spec in variant.blocks():
            training: dict[str, Any] = dict(
                identity=spec.nominal_stride == 1,
                block=variant.block,
                branches=variant.branches,
                epsilon=variant.epsilon,
            )
            block = block_class(
                features=spec.out_channels,
                stride=spec.stride,
                groups=spec.groups,
                dilation=spec.dilation,
                activation=variant.activation,
                squeeze_excite=variant.squeeze_excite,
                squeeze_width=variant.squeeze_width(spec.out_channels),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                **({} if self.deploy else training),
            )
            setattr(self, spec.name, block)
        self.linear = self.classifier(self.num_classes, self.param_dtype)
        self.drop = nn.Dropout(self.dropout)
        if self.has_auxiliary_heads:
            for name in AUX_HEADS:
                setattr(self, name, AuxiliaryHead(self.num_classes, self.dtype, self.param_dtype, variant.epsilon))

    @property
    def has_auxiliary_heads(self) -> bool:
        """Whether training also returns auxiliary logits: True for RepVGGplus in training form."""
        return self.variant.auxiliary_heads and not self.deploy

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Outputs of `features`, in order: strides 2 to 32, or smaller where a stage has stride 1 or is dilated."""
        stride, infos = 1, {}
        for block in self.variant.blocks():
            stride *= block.stride
            infos[block.stage_number] = FeatureInfo(f"stage{block.stage_number}", stride, block.out_channels)
        return tuple(infos.values())

    def _stage_outputs(self, images: Array, train: bool) -> dict[str, Array]:
        if images.ndim != 4:
            raise ValueError(f"images must have shape [N, H, W, C], not {list(images.shape)}")
        self._check_channels(images.shape)
        if train and 0 in images.shape:
            raise ValueError(f"an empty batch, {list(images.shape)}, has no statistics to train with")
        x = images.astype(self.dtype)
        outputs = {}
        for spec in self.variant.blocks():
            frozen = spec.stage_number < self.frozen_stages
            x = getattr(self, spec.name)(x, train and not frozen and not self.frozen_bn)
            if frozen and train:
                x = lax.stop_gradient(x)
            outputs[spec.stage] = x  # the stage's last block wins
        return outputs

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        """Check the images' channels against the first convolution; before it exists, guess whether they come first."""
        kernel = stem_kernel(flatten(self.variables))
        if kernel is not None:
            channels = kernel.shape[2]
        else:
            channels = shape[1] if shape[1] in (1, 3) and shape[2] == shape[3] > 4 else shape[3]
        if shape[3] != channels:
            raise ValueError(
                f"images must have shape [N, H, W, {channels}], not {list(shape)}{channel_hint(shape, channels)}"
            )

    def features(self, images: Array, train: bool = False) -> dict[str, Array]:
        """Return the outputs of the five stages, `{"stage0": [N, H/2, W/2, C0], …, "stage4": [N, H/32, W/32, C4]}`.

        Sizes are rounded up; `feature_info` lists strides and channels. Call it as
        `model.apply(variables, images, method="features")`.

        Args:
          images: `[N, H, W, C]` float, normalised.
          train: use and update batch statistics.
        """
        outputs = self._stage_outputs(images, train)
        if "stage3_second" in outputs:
            outputs["stage3"] = outputs.pop("stage3_second")
            del outputs["stage3_first"]
        return {f"stage{i}": outputs[f"stage{i}"] for i in range(5)}

    def embed(self, images: Array, train: bool = False) -> Array:
        """Return the classifier's input: the last stage's features, averaged over height and width.

        Call it as `model.apply(variables, images, method="embed")`. Training and deploy form give the same result.

        Args:
          images: `[N, H, W, C]` float, normalised.
          train: use and update batch statistics.

        Returns:
          `[N, variant.widths[-1]]` in `param_dtype`.
        """
        return global_average_pool(self._stage_outputs(images, train)["stage4"], self.param_dtype)

    def __call__(self, images: Array, train: bool = False) -> Array | dict[str, Array]:
        """Return the logits of normalised images.

        Args:
          images: `[N, H, W, C]` float, normalised.
          train: use and update batch statistics (pass `mutable=["batch_stats"]`), and apply dropout (pass
            `rngs={"dropout": key}`).

        Returns:
          `[N, num_classes]` in `param_dtype`; for RepVGGplus with `train=True`, a dict of such arrays: `main` and one
          for each auxiliary head.
        """
        outputs = self._stage_outputs(images, train)
        pooled = global_average_pool(outputs["stage4"], self.param_dtype)
        logits = self.linear(self.drop(pooled, deterministic=not train))
        if not self.has_auxiliary_heads or not (train or self.is_initializing()):
            return logits

        def head(name: str) -> Array:
            return getattr(self, name)(outputs[name.removesuffix("_aux")], train and not self.frozen_bn)

        auxiliary = {name: head(name) for name in AUX_HEADS}
        return {"main": logits} | auxiliary if train else logits


def create_model(
    variant: str | Variant,
    num_classes: int = 1000,
    deploy: bool = False,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    remat: bool = False,
    frozen_stages: int = 0,
    frozen_bn: bool = False,
    dropout: float = 0.0,
    strides: Sequence[int] | None = None,
    output_stride: int | None = None,
    activation: Activation | None = None,
    block: BlockKind | None = None,
    branches: Branches | None = None,
    epsilon: float | None = None,
    name: str | None = None,
) -> RepVGG:
    """Return a RepVGG for the name of a published variant, or for a `Variant`.

    `strides`, `output_stride`, `activation`, `block`, `branches` and `epsilon` replace the variant's values, unless
    they are None.

    Args:
      variant: a name from `list_models()`, or a `Variant`.
      num_classes: width of the classifier, at least 1.
      deploy: build the fused form.
      dtype: computation dtype, float32 or bfloat16 (float64 with `jax_enable_x64`).
      param_dtype: dtype of parameters and BN statistics.
      remat: recompute activations in the backward pass to save memory.
      frozen_stages: number of stages, counted from the first of the five, that are not trained.
      frozen_bn: do not update BN statistics in training (`norm_eval`).
      dropout: fraction of the pooled features dropped before the classifier in training.
      strides: strides of stages 0 to 4, each 1 or 2: (1, 1, 2, 2, 2) for images as small as 32x32.
      output_stride: 8 or 16 to dilate the last stages instead of striding, for dense prediction; the weights are the
        same.
      activation: replacement for ReLU: a name such as "gelu", or a function.
      block: kind of block in the training form, "repvgg" or "qarepvgg".
      branches: branches of the training form's blocks.
      epsilon: constant that every BatchNorm adds to the variance: 1e-5, or 1e-3 for weights from Keras and from YOLO
        trainers.
      name: name of the Flax submodule, if the model is built inside another module's compact method.

    Returns:
      The Flax module; it holds no parameters.

    Raises:
      UnknownModelError: no published variant has that name.
      ValueError: `num_classes` is not a positive whole number, a dtype is not floating-point, `frozen_stages` is not
        in 0 to 5, `dropout` is not in [0, 1), or the variant does not allow one of the changes.
    """
    num_classes = checked_count("num_classes", num_classes)
    dtype, param_dtype = checked_dtype("dtype", dtype), checked_dtype("param_dtype", param_dtype)
    if not 0 <= frozen_stages <= 5:
        raise ValueError(f"frozen_stages must be 0 to 5, not {frozen_stages}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if isinstance(variant, str):
        variant = get_variant(variant)
    changes: dict[str, Any] = dict(
        strides=strides,
        output_stride=output_stride,
        activation=activation,
        block=block,
        branches=branches,
        epsilon=epsilon,
    )
    changed = dataclasses.replace(variant, **{field: value for field, value in changes.items() if value is not None})
    if changed != variant:
        variant = dataclasses.replace(changed, published=Published())
    return RepVGG(
        variant,
        num_classes,
        deploy,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        frozen_stages=frozen_stages,
        frozen_bn=frozen_bn,
        dropout=dropout,
        name=name,
    )
