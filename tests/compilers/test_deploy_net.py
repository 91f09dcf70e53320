"""Claim: on an accelerator every block of a deploy net is one fused convolution, with nothing in between."""

import re

import pytest

import repvgg_jax as rv
from repvgg_jax.inference.planned_net import GRAPH_OPTIONS, accelerated
from tests.compilers.programs import deploy_net
from train.targets import Target

SIZE, BATCH = 224, 128


@pytest.mark.slow
@pytest.mark.parametrize("name", rv.list_models())
def test_every_block_is_one_fused_convolution(name: str, target: Target, devices: list):
    model, forward, params, images = deploy_net(name, BATCH, SIZE)
    text = accelerated(forward, devices[0]).lower(params, images).compile().as_text() or ""
    blocks = model.variant.blocks()
    if target.family.platform == "cuda":
        of_gates = 2 * len(blocks) if model.variant.squeeze_excite else 0
        assert (
            len(re.findall(r'custom_call_target="__cudnn\$convBiasActivationForward"', text)) == len(blocks) + of_gates
        )
        assert len(re.findall(r'custom_call_target="__cudnn\$conv', text)) == len(blocks) + of_gates
    else:
        assert len(re.findall(r" convolution\(.*window=\{size=3x3", text)) == len(blocks)
        passes = 2 if model.variant.squeeze_excite else 1  # a gate multiplies the activations that it was computed from
        assert len(written_activations(text)) <= passes * len(blocks) + 1  # the images' conversion
    assert moved_kernels(text) == []


@pytest.mark.slow
def test_with_few_images_every_block_is_a_cudnn_graph(target: Target, devices: list):
    """A graph includes bias and ReLU, and XLA can record it in a CUDA graph, unlike a call of a fused convolution."""
    if target.family.platform != "cuda":
        pytest.skip("only GPUs have cuDNN")
    model, forward, params, images = deploy_net("RepVGG-A0", 1, SIZE)
    lowered = accelerated(forward, devices[0]).lower(params, images)
    text = lowered.compile(compiler_options=GRAPH_OPTIONS).as_text() or ""
    graphs = re.findall(r"fusion\(.*kind=kCustom, calls=%conv_fprop\S*, .*op_name=\"jit\(forward\)/(\w+)", text)
    assert len(graphs) == len(model.variant.blocks())
    assert set(graphs) == {"max", "convert_element_type"}  # the last block's output is converted for the pooling
    assert 'custom_call_target="__cudnn$conv' not in text
    assert moved_kernels(text) == []


def written_activations(text: str) -> list[str]:
    """Return a TPU program's operations that write activations to memory; bias and ReLU are part of a convolution."""
    line = re.compile(rf"%(\S+) = \w+\[{BATCH},\d+,\d+,\d+\]\S* (\S+?)\(")
    free = ("copy", "slice", "bitcast", "parameter", "get-tuple-element", "custom-call")
    operations = (match for match in map(line.search, text[text.index("ENTRY") :].splitlines()) if match)
    return [match[1] for match in operations if not match[2].startswith(free)]


def moved_kernels(text: str) -> list[str]:
    """Return the operations that only move or convert a 3x3 kernel, in whatever layout."""
    line = re.compile(r"%(\S+) = \w+\[([\d,]+)\]\S* (?:transpose|copy|convert|fusion)\(")
    shapes = ((match[1], match[2].split(",")) for match in line.finditer(text[text.index("ENTRY") :]))
    return [name for name, shape in shapes if len(shape) == 4 and shape.count("3") >= 2 and "224" not in shape]
