"""The rewritten network: the same numbers from faster operators."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedded_graph import FEATURES, decoder_of, encoder_of, part, unroll_convolutions
from embedded_voice import ASSETS, Styles, read_weights, session_options


def model_of(nodes, constants, channels):
    """A serialised model from x [1, channels, t] to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, "t"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def quantised_convolution(kernel, stride=1, dilation=1, pads=(0, 0), channels=16, outputs=32, biased=False):
    """A ConvInteger in the form that onnxruntime's dynamic quantisation writes, with random weights."""
    rng = np.random.default_rng(kernel)
    constants = {
        "w": rng.integers(0, 255, (outputs, channels, kernel)).astype(np.uint8),
        "wz": np.array(128, np.uint8),
        "ws": np.array(0.01, np.float32),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("Mul", ["s", "ws"], ["sw"]),
        helper.make_node(
            "ConvInteger", ["q", "w", "z", "wz"], ["i"],
            kernel_shape=[kernel], strides=[stride], dilations=[dilation], pads=list(pads), group=1,
        ),
        helper.make_node("Cast", ["sum" if biased else "i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "sw"], ["y"]),
    ]  # fmt: skip
    if biased:
        constants |= {"b": rng.normal(size=outputs).astype(np.float32), "shape": np.array([1, outputs, 1])}
        nodes[3:3] = [
            helper.make_node("Div", ["b", "sw"], ["steps"]),
            helper.make_node("Floor", ["steps"], ["whole"]),
            helper.make_node("Cast", ["whole"], ["int"], to=TensorProto.INT32),
            helper.make_node("Reshape", ["int", "shape"], ["added"]),
            helper.make_node("Add", ["i", "added"], ["sum"]),
        ]
    return model_of(nodes, constants, channels)


def snake(channels=6):
    """A snake activation with the norm before it, and a signal for it."""
    rng = np.random.default_rng(2)
    alpha = rng.uniform(0.2, 3, (1, channels, 1)).astype(np.float32)
    constants = {
        "gain": rng.normal(size=(1, channels, 1)).astype(np.float32),
        "bias": rng.normal(size=(1, channels, 1)).astype(np.float32),
        "alpha": alpha,
        "inverse": 1 / alpha,
        "two": np.array(2, np.float32),
        "axes": np.array([2]),
        "epsilon": np.array(1e-5, np.float32),
    }
    steps = """ReduceMean x axes -> mean; Sub x mean -> centred; Mul centred centred -> squared; ReduceMean squared
        axes -> square; Add square epsilon -> more; Sqrt more -> deviation; Div centred deviation -> unit; Mul unit gain
        -> scaled; Add scaled bias -> norm; Mul alpha norm -> angle; Sin angle -> sine; Pow sine two -> power;
        Mul power inverse -> wave; Add norm wave -> y"""
    nodes = []
    for kind, *inputs, _, output in map(str.split, steps.split(";")):
        nodes.append(helper.make_node(kind, inputs, [output], **({"keepdims": 1} if kind == "ReduceMean" else {})))
    return model_of(nodes, constants, channels), rng.normal(2, 3, size=(1, channels, 300)).astype(np.float32)


def run(model, **inputs):
    """The first output of a serialised model."""
    return onnxruntime.InferenceSession(model, session_options(2)).run(None, inputs)[0]


def operators(model):
    """The kinds of operator in a serialised model."""
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation", "pads"), [
    (1, 1, 1, (0, 0)), (3, 1, 1, (1, 1)), (7, 1, 3, (9, 9)), (5, 2, 1, (2, 1)), (11, 1, 5, (25, 25)), (4, 3, 2, (0, 3)),
])  # fmt: skip
def test_a_convolution_gives_the_same_numbers(kernel, stride, dilation, pads, biased):
    model = quantised_convolution(kernel, stride, dilation, pads, biased=biased)
    signal = np.random.default_rng(1).normal(size=(1, 16, 97)).astype(np.float32)
    faster = unroll_convolutions(model)
    assert operators(faster).isdisjoint({"ConvInteger", "MatMulInteger"})  # one node with its scale and bias
    assert np.allclose(run(model, x=signal), run(faster, x=signal), rtol=1e-5, atol=1e-5)


def test_a_snake_with_its_norm_gives_the_same_numbers():
    model, signal = snake()
    faster = unroll_convolutions(model)
    assert "InstanceNormalization" in operators(faster) and "Sin" not in operators(faster)
    assert np.allclose(run(model, x=signal), run(faster, x=signal), rtol=1e-4, atol=1e-4)


def test_the_stft_gives_the_same_numbers_and_signs():
    decoder = part(read_weights(), inputs=FEATURES, outputs=["/decoder/decoder/generator/STFT_output_0"])
    assert "STFT" in operators(decoder)
    assert "STFT" not in operators(unroll_convolutions(decoder))
    pitch = np.linspace(90, 300, 160, dtype=np.float32)[None]
    plain, faster = (run(model, **{FEATURES[1]: pitch})[0] for model in (decoder, unroll_convolutions(decoder)))
    assert np.allclose(plain, faster, atol=1e-5)
    # The imaginary part of either end is a zero; its sign, which the operator rounds to, is that of the phase of pi.
    for band, share in ((0, 0.98), (-1, 0.7)):
        signs = [np.signbit(spectrum[plain[:, band, 0] < -1e-4, band, 1]) for spectrum in (plain, faster)]
        assert np.mean(signs[0] == signs[1]) > share


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
    halves = encoder_of(model), decoder_of(model)
    encoder, decoder = (onnxruntime.InferenceSession(half, session_options(2)) for half in halves)
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
