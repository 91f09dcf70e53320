"""An independent PyTorch RepVGG: the oracle that the JAX code is tested against.

Written only from the paper (arXiv 2101.03697) and the project's table of facts. Images are [N, C, H, W].
State-dict keys, their order and their shapes are those of the authors' checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

SE = Literal["pre", "post"] | None  # squeeze-excite before the ReLU (C/16), or after it (C/4)
LAST_GROUPED_BLOCK = 26


class Variant(NamedTuple):
    """One row of the table of published models."""

    blocks: tuple[int, int, int, int]
    widths: tuple[float, float, float, float]
    groups: int = 1
    se: SE = None
    plus: bool = False


A, B, D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
VARIANTS: dict[str, Variant] = {
    "RepVGG-A0": Variant(A, (0.75, 0.75, 0.75, 2.5)),
    "RepVGG-A1": Variant(A, (1, 1, 1, 2.5)),
    "RepVGG-A2": Variant(A, (1.5, 1.5, 1.5, 2.75)),
    "RepVGG-B0": Variant(B, (1, 1, 1, 2.5)),
    "RepVGG-B1": Variant(B, (2, 2, 2, 4)),
    "RepVGG-B1g2": Variant(B, (2, 2, 2, 4), groups=2),
    "RepVGG-B1g4": Variant(B, (2, 2, 2, 4), groups=4),
    "RepVGG-B2": Variant(B, (2.5, 2.5, 2.5, 5)),
    "RepVGG-B2g2": Variant(B, (2.5, 2.5, 2.5, 5), groups=2),
    "RepVGG-B2g4": Variant(B, (2.5, 2.5, 2.5, 5), groups=4),
    "RepVGG-B3": Variant(B, (3, 3, 3, 5)),
    "RepVGG-B3g2": Variant(B, (3, 3, 3, 5), groups=2),
    "RepVGG-B3g4": Variant(B, (3, 3, 3, 5), groups=4),
    "RepVGG-D2se": Variant(D, (2.5, 2.5, 2.5, 5), se="pre"),
    "RepVGGplus-L2pse": Variant(D, (2.5, 2.5, 2.5, 5), se="post", plus=True),
}


class ConvBN(nn.Sequential):
    """`conv` without a bias, then `bn`; padded on both sides, so the output size depends on the stride alone."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid gate computed from the spatial means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.up(self.down(mean).relu()).sigmoid()


class Block(nn.Module):
    """A RepVGG block: three summed branches while training, one biased 3x3 convolution when deployed."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, deploy: bool, se: SE) -> None:
        super().__init__()
        self.deploy, self.groups = deploy, groups
        if se == "pre":
            self.se = SqueezeExcite(c_out, c_out // 16)
        elif se == "post":
            self.post_se = SqueezeExcite(c_out, c_out // 4)
        if deploy:
            self.rbr_reparam = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups)
            return
        self.rbr_identity = nn.BatchNorm2d(c_in) if stride == 1 and c_in == c_out else None
        self.rbr_dense = ConvBN(c_in, c_out, 3, stride, groups)
        self.rbr_1x1 = ConvBN(c_in, c_out, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            y = self.rbr_reparam(x)
        else:
            y = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                y = y + self.rbr_identity(x)
        if hasattr(self, "se"):
            y = self.se(y)
        y = y.relu()
        return self.post_se(y) if hasattr(self, "post_se") else y

    def fused(self) -> tuple[Tensor, Tensor]:
        """Return the equivalent [C_out, C_in/groups, 3, 3] kernel and [C_out] bias, in float64."""
        dense, point = self.rbr_dense, self.rbr_1x1
        scale, bias = affine(dense.bn)
        kernel = dense.conv.weight.detach().double() * scale[:, None, None, None]
        scale, shift = affine(point.bn)
        kernel[:, :, 1, 1] += point.conv.weight.detach().double()[:, :, 0, 0] * scale[:, None]
        bias = bias + shift
        if self.rbr_identity is not None:
            scale, shift = affine(self.rbr_identity)
            channel = torch.arange(len(scale))
            kernel[channel, channel % kernel.shape[1], 1, 1] += scale
            bias = bias + shift
        return kernel, bias


def affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation, which computes x * scale + shift; both in float64."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.detach().double() - bn.running_mean.double() * scale


class PlusStage(nn.Module):
    """RepVGGplus keeps a stage's blocks under `blocks`."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class RepVGG(nn.Module):
    """Five stages, global average pooling, a linear head. `forward` returns logits [N, num_classes]."""

    plus = False

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths_multipliers: Sequence[float],
        groups: int,
        num_classes: int,
        deploy: bool,
        se: SE = None,
        in_channels: int = 3,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "num_blocks": num_blocks, "widths_multipliers": widths_multipliers, "groups": groups,
            "num_classes": num_classes, "deploy": deploy, "se": se, "in_channels": in_channels, "strides": strides,
        }  # fmt: skip
        self.deploy, index, channels = deploy, 0, in_channels

        def stage(width: int, blocks: int, stride: int) -> nn.Sequential:
            nonlocal index, channels
            stack = nn.Sequential()
            for i in range(blocks):
                grouped = index > 0 and index % 2 == 0 and index <= LAST_GROUPED_BLOCK
                g = groups if grouped else 1
                stack.append(Block(channels, width, 1 if i else stride, g, deploy, se))
                channels, index = width, index + 1
            return stack

        a = widths_multipliers
        widths = [int(64 * a[0]), int(128 * a[1]), int(256 * a[2]), int(512 * a[3])]
        self.stage0 = stage(min(64, int(64 * a[0])), 1, strides[0])[0]
        if self.plus:
            half = num_blocks[2] // 2
            self.stage1 = PlusStage(stage(widths[0], num_blocks[0], strides[1]))
            self.stage2 = PlusStage(stage(widths[1], num_blocks[1], strides[2]))
            self.stage3_first = PlusStage(stage(widths[2], half, strides[3]))
            self.stage3_second = PlusStage(stage(widths[2], num_blocks[2] - half, 1))
            self.stage4 = PlusStage(stage(widths[3], num_blocks[3], strides[4]))
        else:
            for s, (width, blocks) in enumerate(zip(widths, num_blocks, strict=True), start=1):
                self.add_module(f"stage{s}", stage(width, blocks, strides[s]))
        self.linear = nn.Linear(channels, num_classes)
        if self.plus and not deploy:
            self.stage1_aux = auxiliary_head(widths[0], num_classes)
            self.stage2_aux = auxiliary_head(widths[1], num_classes)
            self.stage3_first_aux = auxiliary_head(widths[2], num_classes)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        x, auxiliary = images, {}
        for name, module in self.named_children():
            if not name.startswith("stage") or name.endswith("_aux"):
                continue
            x = module(x)
            if self.training and hasattr(self, f"{name}_aux"):
                auxiliary[f"{name}_aux"] = getattr(self, f"{name}_aux")(x)
        main = self.linear(x.mean((2, 3)))
        return {"main": main, **auxiliary} if auxiliary else main


class RepVGGplus(RepVGG):
    """Stage 3 in two halves, and auxiliary heads; in train() mode the training form returns a dict of logits."""

    plus = True


def auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Downsample with 3x3 conv, BN, ReLU; pool; classify."""
    downsample = ConvBN(channels, channels, 3, stride=2)
    downsample.add_module("relu", nn.ReLU())
    return nn.Sequential(downsample, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def create(name: str, num_classes: int = 1000, deploy: bool = False, in_channels: int = 3) -> RepVGG:
    """Return a published variant with PyTorch's default initialisation, in train() mode."""
    v = VARIANTS[name]
    kind = RepVGGplus if v.plus else RepVGG
    return kind(v.blocks, v.widths, v.groups, num_classes, deploy, v.se, in_channels)


def switch_to_deploy(model: RepVGG) -> RepVGG:
    """Return the deploy form of a training-form model, in eval() mode and the same dtype; `model` is not modified."""
    state = {k: v for k, v in model.state_dict().items() if "rbr_" not in k and "_aux." not in k}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            state[f"{name}.rbr_reparam.weight"], state[f"{name}.rbr_reparam.bias"] = block.fused()
    deploy = type(model)(**{**model.config, "deploy": True}).to(model.linear.weight.dtype)
    deploy.load_state_dict(state)
    return deploy.eval()


@torch.no_grad()
def randomize(model: RepVGG, seed: int | torch.Generator = 0) -> RepVGG:
    """Randomise BN and SE values and weights of a training-form model in place, so that outputs in eval() are O(1).

    Every branch convolution and linear layer is scaled to a root mean square output near 1 on noise images.
    """
    assert not model.deploy, "randomize the training form, then switch_to_deploy"
    g = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=g) * (high - low) + low

    def normal(like: Tensor, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(like.shape, generator=g) * std + mean

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            sign = torch.where(uniform(module.weight, 0, 1) < 0.05, -1.0, 1.0)
            highest = 1.0 if name.endswith("rbr_identity") else 1.5  # a contracting identity keeps depth O(1)
            module.weight.copy_(sign * uniform(module.weight, 0.5, highest))
            module.bias.copy_(normal(module.bias, 0.2))
            module.running_mean.copy_(normal(module.running_mean, 0.2))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            # Trained gates are seldom saturated: more extreme ones, one after another, amplify rounding a hundredfold.
            gain = 0.1 if name.endswith((".down", ".up")) else 2.0
            module.weight.copy_(normal(module.weight, (gain / module.weight[0].numel()) ** 0.5))
            if module.bias is not None:
                module.bias.copy_(normal(module.bias, 0.2))

    def rescale(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        bias = 0.0 if module.bias is None else module.bias.view([-1] + [1] * (output.ndim - 2))
        factor = (output - bias).square().mean().rsqrt()
        module.weight.mul_(factor)
        return (output - bias) * factor + bias

    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.endswith((".down", ".up"))
    ]
    hooks = [layer.register_forward_hook(rescale) for layer in layers]
    was_training, size = model.training, (2, model.config["in_channels"], 64, 64)
    images = torch.randn(size, generator=g).to(model.linear.weight)
    model.eval().training = True  # layers use running statistics, but the auxiliary heads run too
    model(images)
    for hook in hooks:
        hook.remove()
    return model.train(was_training)


def recipe_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Apply the paper's rule: decay conv and linear kernels and `rbr_identity`'s BN weight, nothing else."""

    def decays(name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1 or name.endswith("rbr_identity.weight")

    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


def sgd_steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr_schedule: Callable[[int], float] | Sequence[float],
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.1,
    mixup: float = 1.0,
    accumulate: int = 1,
    average: AveragedModel | None = None,
) -> list[float]:
    """Train `model` in place on (images, integer labels), one step per batch; return the loss before each step.

    `mixup` is the share that an image keeps; the rest comes from the image at the mirrored position of its portion. The
    loss is mixed rather than the labels (arXiv 1710.09412). `average` is updated after every step.
    """
    groups = recipe_parameter_groups(model, weight_decay)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
    dtype, losses = next(model.parameters()).dtype, []
    model.train()
    for step, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule(step) if callable(lr_schedule) else lr_schedule[step]
        optimizer.zero_grad()
        total = 0.0
        for part, truth in zip(images.to(dtype).chunk(accumulate), labels.chunk(accumulate), strict=True):
            outputs = model(mixup * part + (1 - mixup) * part.flip(0))
            outputs = outputs if isinstance(outputs, dict) else {"main": outputs}
            loss = torch.zeros((), dtype=dtype)
            for name, logits in outputs.items():
                weight = 1.0 if name == "main" else aux_weight
                for share, wanted in ((mixup, truth), (1 - mixup, truth.flip(0))):
                    loss = loss + weight * share * F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
            (loss / accumulate).backward()
            total += loss.item() / accumulate
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        losses.append(total)
    return losses
