"""The rewritten network: the same numbers from faster operators."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedded_graph import FEATURES, split, unroll_convolutions
from embedded_voice import ASSETS, Styles, read_weights, session_options


def quantised_convolution(kernel, stride=1, dilation=1, pads=(0, 0), channels=16, outputs=32):
    """A ConvInteger in the form that onnxruntime's dynamic quantisation writes, with random weights."""
    rng = np.random.default_rng(kernel)
    constants = {
        "w": rng.integers(0, 255, (outputs, channels, kernel)).astype(np.uint8),
        "wz": np.array(128, np.uint8),
        "ws": np.array(0.01, np.float32),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node(
            "ConvInteger", ["q", "w", "z", "wz"], ["i"],
            kernel_shape=[kernel], strides=[stride], dilations=[dilation], pads=list(pads), group=1,
        ),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["sw"]),
        helper.make_node("Mul", ["f", "sw"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, "t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs, "u"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def run(model, **inputs):
    """The first output of a serialised model."""
    return onnxruntime.InferenceSession(model, session_options(2)).run(None, inputs)[0]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "pads"), [
    (1, 1, 1, (0, 0)), (3, 1, 1, (1, 1)), (7, 1, 3, (9, 9)), (5, 2, 1, (2, 1)), (11, 1, 5, (25, 25)), (4, 3, 2, (0, 3)),
])  # fmt: skip
def test_a_convolution_gives_the_same_numbers(kernel, stride, dilation, pads):
    model = quantised_convolution(kernel, stride, dilation, pads)
    signal = np.random.default_rng(1).normal(size=(1, 16, 97)).astype(np.float32)
    faster = unroll_convolutions(model)
    assert "ConvInteger" not in {node.op_type for node in onnx.load_from_string(faster).graph.node}
    assert np.allclose(run(model, x=signal), run(faster, x=signal), rtol=1e-5, atol=1e-5)


@pytest.fixture
def inputs():
    """What the network is given for a short text."""
    vocabulary = json.loads((ASSETS / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    tokens = [vocabulary[symbol] for symbol in "həlˈO wˈɜɹld, ðə bˈOts lˈA stˈɪl."]
    return {
        "tokens": np.array([[0, *tokens, 0]], np.int64),
        "style": Styles().table("am_onyx")[len(tokens) - 1][None],
        "speed": np.ones(1, np.float32),
    }


def test_the_halves_give_to_the_bit_what_the_whole_gives(inputs):
    model = unroll_convolutions(read_weights())
    encoder, decoder = (onnxruntime.InferenceSession(half, session_options(2)) for half in split(model))
    features = dict(zip(FEATURES, encoder.run(None, inputs), strict=True))
    assert {value.name for value in decoder.get_inputs()} == {*FEATURES, "style"}
    assert np.array_equal(decoder.run(None, {**features, "style": inputs["style"]})[0], run(model, **inputs))


def test_the_voice_keeps_its_timing_and_its_sound(inputs):
    plain, faster = (run(model, **inputs).ravel() for model in (read_weights(), unroll_convolutions(read_weights())))
    assert len(plain) == len(faster)
    levels = [np.sqrt(np.mean(samples**2)) for samples in (plain, faster)]
    assert levels[1] == pytest.approx(levels[0], rel=0.05)
    assert np.corrcoef(*(spectrum(samples) for samples in (plain, faster)))[0, 1] > 0.98


def spectrum(samples):
    """Log power of 20 ms frames, flattened."""
    frames = samples[: len(samples) // 480 * 480].reshape(-1, 480) * np.hanning(480)
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 + 1e-4).ravel()
