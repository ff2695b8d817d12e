"""The decoder for OpenVINO: each rewrite gives the numbers of what it replaces, and every voice the same sound."""

import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_embedded_graph import model_of, quantised_convolution, snake
from test_scheduling import wait_until

import embedded_openvino
import embedded_voice
import engines
import settings
from app import Speech
from embedded_graph import attributes_of, decoder_of
from embedded_openvino import (
    INPUTS,
    RANGES,
    ChannelsLast,
    ForOpenVINO,
    Range,
    Snakes,
    fingerprint,
    for_openvino,
    open_decoder,
    read_ranges,
)
from embedded_voice import Cancelled, EmbeddedVoice, read_weights
from engines import EmbeddedEngine, SynthesisOptions, find_runtime
from quiet_openvino import openvino
from scheduling import Ticket
from settings import Settings
from voices import Voices

VOICES = Voices.load(Settings().voices_file).voices
TEXTS = {
    "en": "By noon the wind had turned, and nobody who knew the coast went out.",
    "zh": "渡口只有一条旧船，船主想找一个帮手。",
    "mixed": "这个bug其实不难，小林很快就找到了原因。",
}


def nodes_of(model):
    """The nodes of a serialised model by the name of their output."""
    return {node.output[0]: node for node in onnx.load_from_string(model).graph.node}


def operators(model):
    """The kinds of operator in a serialised model."""
    return {node.op_type for node in nodes_of(model).values()}


def run(model, x):
    """What a serialised model makes of x, or of its inputs by name, in onnxruntime."""
    inputs = x if isinstance(x, dict) else {"x": x}
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def run_in_openvino(model, x):
    """The same in OpenVINO, in float32 where it is not int8."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (7, 3), (11, 5)])
def test_an_integer_convolution_is_one_of_the_numbers_that_its_weights_stand_for(kernel, dilation, biased):
    pads = [dilation * (kernel - 1) // 2] * 2
    model = quantised_convolution(kernel, dilation=dilation, pads=pads, biased=biased)
    signal = np.random.default_rng(1).normal(size=(1, 16, 97)).astype(np.float32)
    rewritten = ForOpenVINO(model, None).result()
    assert operators(rewritten) == {"Conv"}
    step = np.ptp(signal) / 255  # half of one is what the integer form may be off for each product
    weights = (np.random.default_rng(kernel).integers(0, 255, (32, 16, kernel)) - 128.0) * 0.01
    bound = step / 2 * np.abs(weights).sum(axis=(1, 2)).max() + step * 0.01  # and less than one product of a bias
    assert np.abs(run(model, signal) - run(rewritten, signal)).max() < bound


def test_an_integer_product_is_one_of_the_numbers_that_its_weights_stand_for():
    rng = np.random.default_rng(6)
    steps = rng.integers(0, 255, (97, 32)).astype(np.uint8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["sw"]),
        helper.make_node("Mul", ["f", "sw"], ["y"]),
    ]
    constants = {"w": steps, "wz": np.array(128, np.uint8), "ws": np.array(0.01, np.float32)}
    model = model_of(nodes, constants, 16)
    signal = rng.normal(size=(1, 16, 97)).astype(np.float32)
    rewritten = ForOpenVINO(model, None).result()
    assert operators(rewritten) == {"MatMul"}
    bound = np.ptp(signal) / 255 / 2 * np.abs((steps - 128.0) * 0.01).sum(axis=0).max()
    assert np.abs(run(model, signal) - run(rewritten, signal)).max() < bound
    assert np.allclose(run_in_openvino(rewritten, signal), run(rewritten, signal), atol=1e-4)


@pytest.mark.parametrize(("kernel", "dilation", "pads"), [
    (3, 1, (1, 1)), (3, 1, (0, 0)), (4, 1, (2, 1)), (3, 5, (5, 5)), (7, 3, (9, 0)),
])  # fmt: skip
def test_a_convolution_in_int8_is_near_the_one_in_float(kernel, dilation, pads, monkeypatch):
    monkeypatch.setattr(embedded_openvino, "GENERATOR", "x")
    model = quantised_convolution(kernel, dilation=dilation, pads=pads, channels=32, outputs=64)
    signal = np.random.default_rng(2).normal(size=(1, 32, 200)).astype(np.float32)
    rewritten = ForOpenVINO(model, {"x": Range(signal.min(), signal.max(), np.ones(32))}).result()
    assert "QuantizeLinear" in operators(rewritten)
    [convolution] = [node for node in nodes_of(rewritten).values() if node.op_type == "Conv"]
    assert attributes_of(convolution)["pads"] == [0, 0]
    exact = run(ForOpenVINO(model, None).result(), signal)
    wide = run_in_openvino(ChannelsLast(rewritten).result(), signal)
    for result in (run(rewritten, signal), run_in_openvino(rewritten, signal), wide.reshape(exact.shape)):
        assert np.sqrt(np.mean((result - exact) ** 2)) < 0.02 * exact.std()


def test_a_small_convolution_stays_in_float(monkeypatch):
    monkeypatch.setattr(embedded_openvino, "GENERATOR", "x")
    model = quantised_convolution(3, pads=(1, 1), channels=32, outputs=48)
    signal = np.random.default_rng(2).normal(size=(1, 32, 200)).astype(np.float32)
    rewritten = ForOpenVINO(model, {"x": Range(signal.min(), signal.max(), np.ones(32))}).result()
    assert "QuantizeLinear" not in operators(rewritten)
    assert np.allclose(run(rewritten, signal), run(ForOpenVINO(model, None).result(), signal), atol=1e-4)


def test_two_products_of_neighbouring_weights_are_within_16_bits():
    """AVX2 adds them so, and takes the largest number for what is larger."""
    model = onnx.load_from_string(ForOpenVINO(decoder_of(read_weights()), read_ranges()).result())
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    maker = {node.output[0]: node for node in model.graph.node}
    weights = [maker.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"]
    kernels = [arrays[scaled.input[0]].astype(int) for scaled in weights if scaled]
    assert len(kernels) > 40
    halves = [half for kernel in kernels for half in (kernel.clip(min=0), kernel.clip(max=0))]
    most = max(np.abs(half[:, ::2] + half[:, 1::2]).max() for half in halves)
    assert 120 < most <= 128  # times 255
    assert max(np.abs(kernel).max() for kernel in kernels) == 127


@pytest.mark.parametrize(("kernel", "pads"), [(1, (0, 0)), (3, (1, 1)), (4, (2, 1)), (1, (1, 0))])
def test_a_product_of_frames_side_by_side_is_the_convolution(kernel, pads, monkeypatch):
    model = quantised_convolution(kernel, pads=pads, channels=32, outputs=64)
    signal = np.random.default_rng(2).normal(size=(1, 32, 200)).astype(np.float32)
    product = ForOpenVINO(model, {"x": Range(-4.0, 4.0, np.ones(32))}).result()
    assert "Conv" not in operators(product)
    monkeypatch.setattr(embedded_openvino, "GENERATOR", "x")
    exact = run(ForOpenVINO(model, None).result(), signal)
    for result in (run(product, signal), run_in_openvino(product, signal)):
        assert np.sqrt(np.mean((result - exact) ** 2)) < 0.01 * exact.std()


def test_four_dimensions_change_the_layout_and_not_the_sound():
    three = ForOpenVINO(Snakes(decoder_of(read_weights())).result(), read_ranges()).result()
    four = ChannelsLast(three).result()
    rng, frames = np.random.default_rng(4), 40
    voiced = np.full((1, 2 * frames), 120, np.float32), np.zeros((1, 2 * frames), np.float32)
    phonemes, style = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in ((1, 512, frames), (1, 256)))
    features = dict(zip(INPUTS, (phonemes, *voiced, style), strict=True))
    nodes = nodes_of(four)
    quantised = [node for node in nodes.values() if node.op_type == "Conv" and node.input[1] in nodes]
    assert {len(attributes_of(node)["kernel_shape"]) for node in quantised} == {2}
    back = sum(node.op_type == "Squeeze" for node in nodes.values())
    assert back < len(quantised) / 4, "from one convolution to the next it stays in four"
    plain, turned = run(three, features), run(four, features)
    assert np.sqrt(np.mean((turned - plain) ** 2)) < 0.01 * np.std(plain)


@pytest.mark.parametrize("offset", [0, 2, 30])
def test_a_snake_with_its_norm_is_written_down_once(offset):
    model, signal = snake()
    signal += offset
    signal[:, 3] = 5  # a channel without variance
    rewritten = Snakes(model).result()
    assert "ReduceL2" in operators(rewritten)
    exact = run(model, signal)
    for result in (run(rewritten, signal), run_in_openvino(rewritten, signal)):
        assert np.allclose(result, exact, rtol=1e-3, atol=2e-3)


def test_a_snake_of_a_norm_whose_gain_is_nothing_is_one_of_its_bias():
    model, signal = snake()
    model = onnx.load_from_string(model)
    [gain] = [tensor for tensor in model.graph.initializer if tensor.name == "gain"]
    gain.CopyFrom(numpy_helper.from_array(np.zeros((1, 6, 1), np.float32), "gain"))
    model = model.SerializeToString()
    assert np.allclose(run(Snakes(model).result(), signal), run(model, signal), atol=2e-3)


@pytest.mark.parametrize("scale", [0.1, 3, 100])
def test_the_chain_is_the_sine_squared(scale):
    surgery = Snakes(model_of([], {}, 4))
    surgery.op("Identity", surgery.sine_squared("x"), output="y")
    rewritten = surgery.result()
    x = (scale * np.random.default_rng(3).normal(size=(1, 4, 5000))).astype(np.float32)
    exact = np.sin(np.pi * x.astype(np.float64)) ** 2
    for result in (run(rewritten, x), run_in_openvino(rewritten, x)):
        assert np.abs(result - exact).max() < 5e-4


def transposed_convolution(rng, stride, **attributes):
    """A ConvTranspose over two strides."""
    constants = {
        "w": rng.normal(size=(64, 32, 2 * stride)).astype(np.float32),
        "b": rng.normal(size=32).astype(np.float32),
    }
    node = helper.make_node(
        "ConvTranspose", ["x", "w", "b"], ["y"],
        kernel_shape=[2 * stride], strides=[stride], pads=[stride // 2] * 2, dilations=[1], group=1, **attributes,
    )  # fmt: skip
    return model_of([node], constants, 64)


@pytest.mark.parametrize(("stride", "attributes"), [(1, {}), (10, {"output_padding": [1]})])
def test_a_transposed_convolution_that_no_product_equals_stays(stride, attributes):
    model = transposed_convolution(np.random.default_rng(5), stride, **attributes)
    assert operators(ForOpenVINO(model, None).result()) == {"ConvTranspose"}


@pytest.mark.parametrize("stride", [10, 6, 5])
def test_a_transposed_convolution_is_a_product_and_a_transposition(stride):
    rng = np.random.default_rng(stride)
    model = transposed_convolution(rng, stride)
    rewritten, int8 = (ForOpenVINO(model, ranges).result() for ranges in (None, {"another": Range(0, 1, np.ones(64))}))
    assert "MatMul" in operators(rewritten) and operators(rewritten).isdisjoint({"ConvTranspose", "Conv"})
    assert "DequantizeLinear" in operators(int8)
    x = rng.normal(size=(1, 64, 23)).astype(np.float32)
    exact = run(model, x)
    assert np.allclose(exact, run(rewritten, x), atol=1e-3)
    for result in (run(int8, x), run_in_openvino(int8, x)):
        assert np.sqrt(np.mean((result - exact) ** 2)) < 0.015 * exact.std()


def test_every_range_is_of_a_tensor_that_is_quantised():
    surgery = ForOpenVINO(decoder_of(read_weights()), None)
    surgery.result()
    assert set(surgery.quantised) == set(read_ranges())
    assert all(low <= 0 < high and min(sizes) > 0 and max(sizes) == 1 for low, high, sizes in read_ranges().values())


def test_nothing_slow_is_left_of_the_decoder():
    nodes = nodes_of(for_openvino(decoder_of(read_weights())))
    left = {node.op_type for node in nodes.values()}
    assert left.isdisjoint({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "STFT"})
    squared = [node.input[0] for node in nodes.values() if node.op_type == "Pow"]
    assert len(squared) > 48 and not any(nodes[name].op_type == "Sin" for name in squared if name in nodes)
    assert not any("/ups." in node.name for node in nodes.values() if node.op_type == "ConvTranspose")


@pytest.fixture
def measure_ranges(monkeypatch):
    """The tool beside the ranges."""
    monkeypatch.syspath_prepend(RANGES.parent)
    return importlib.import_module("measure_ranges")


def test_the_ranges_are_measured_on_what_the_decoder_is_given(measure_ranges):
    assert set(next(measure_ranges.features())) == set(INPUTS)


def test_a_low_channel_is_not_lost_in_the_steps_of_a_loud_one(measure_ranges, monkeypatch):
    """Every other is a twentieth as loud, and weighs twenty times as much."""
    monkeypatch.setattr(embedded_openvino, "GENERATOR", "x")
    rng = np.random.default_rng(5)
    signal = rng.normal(size=(1, 32, 400)).astype(np.float32)
    weights = rng.integers(-120, 120, (64, 32, 3))
    signal[:, ::2] /= 20
    weights[:, 1::2] //= 20
    model = onnx.load_from_string(quantised_convolution(3, channels=32, outputs=64))
    [old] = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    old.CopyFrom(numpy_helper.from_array((weights + 128).astype(np.uint8), "w"))
    model = model.SerializeToString()
    exact = run(ForOpenVINO(model, None).result(), signal)

    def noise(within):
        made = run_in_openvino(ForOpenVINO(model, {"x": within}).result(), signal)
        return np.std(made - exact) / np.std(exact)

    found = measure_ranges.best_range(signal[0])
    assert noise(Range(signal.min(), signal.max(), np.ones(32))) > 0.05
    assert noise(found) < 0.02
    assert found.sizes[::2].max() < 0.2 < found.sizes[1::2].min()


@pytest.fixture(scope="module")
def runtimes():
    """The engine on each runtime."""
    return EmbeddedVoice(runtime="onnxruntime"), EmbeddedVoice(runtime="openvino")


@pytest.fixture(scope="module")
def exact():
    """The engine with nothing rounded in the decoder: the numbers that its weights stand for, in float32."""
    decoder = onnxruntime.InferenceSession(ForOpenVINO(decoder_of(read_weights()), None).result())
    voice = EmbeddedVoice(runtime="onnxruntime")
    voice._network._decoder.run = lambda features, ticket, *, keep: decoder.run(None, features)[0].ravel()
    return voice


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.id)
def test_a_voice_sounds_alike_on_both_runtimes(runtimes, exact, voice, language):
    text, style = TEXTS[language], getattr(voice.embedded, language)
    plain, fast, true = (engine.speak(text, style) for engine in (*runtimes, exact))
    assert len(plain) == len(fast) == len(true)
    for samples in (plain, fast):
        assert np.abs(samples).max() < 1.3 * np.abs(true).max()
        assert 20 * np.log10(np.std(samples) / np.std(true)) == pytest.approx(0, abs=0.3)
    (one, power), (other, _) = bands(plain), bands(fast)
    assert np.abs(one - other)[power > power.max() - 35].mean() < 2  # dB


@pytest.mark.parametrize("language", TEXTS)
def test_the_noise_of_int8_is_low(runtimes, exact, language):
    """Against float32: with AVX2 alone 18.6 to 19.8 dB down; 14.1 to 16.1 with a range for a tensor."""
    text, style = TEXTS[language], getattr(VOICES[0].embedded, language)
    fast, true = (engine.speak(text, style) for engine in (runtimes[1], exact))
    assert 20 * np.log10(np.std(true) / np.std(fast - true)) > 16


def bands(samples, count=40):
    """Power in dB of each frame of 43 ms in `count` bands of equal width up to 11 kHz, and in all."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 1024)[::256] * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames))[:, : 11 * count] ** 2
    return 10 * np.log10(power.reshape(len(frames), count, -1).sum(2) + 1e-6), 10 * np.log10(power.sum(1) + 1e-6)


def test_the_runtime_is_chosen_by_the_cpu(tmp_path, monkeypatch):
    for flags, runtime in {"avx avx2 avx512_vnni": "openvino", "avx avx2": "openvino", "avx": "onnxruntime"}.items():
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
        monkeypatch.setattr(settings, "CPU_INFO", tmp_path / "cpuinfo")
        assert find_runtime() == runtime
        assert EmbeddedEngine(Settings()).report() == {"runtime": runtime}
    assert EmbeddedEngine(Settings(embedded_runtime="openvino", threads=3)).slots == 1
    monkeypatch.setattr(settings, "CPU_INFO", tmp_path / "none")  # another system's
    assert find_runtime() == "onnxruntime"
    assert EmbeddedEngine(Settings(threads=3)).slots == 3


@pytest.fixture
def able_cpu(tmp_path, monkeypatch):
    """A CPU on which OpenVINO would be chosen."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx2\n")
    monkeypatch.setattr(settings, "CPU_INFO", tmp_path / "cpuinfo")


def test_without_openvino_onnxruntime_is_chosen(able_cpu, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert find_runtime() == "onnxruntime"


@pytest.fixture
def gate(monkeypatch):
    """Holds back the building of OpenVINO's decoder until it is set."""
    gate, opening = threading.Event(), embedded_voice.open_decoder

    def held(*given, build):
        return (gate.wait(60) if build else True) and opening(*given, build=build)

    monkeypatch.setattr(embedded_voice, "open_decoder", held)
    yield gate
    gate.set()


def built():
    """Wait until what is being built is built, or could not be."""
    for thread in threading.enumerate():
        if thread.name == "build":
            thread.join(60)


def test_the_first_start_speaks_on_onnxruntime_until_openvino_s_decoder_is_built(able_cpu, tmp_path, gate, runtimes):
    text, style = TEXTS["en"], VOICES[0].embedded.en
    on_onnxruntime, on_openvino = (voice.speak(text, style) for voice in runtimes)

    def sound(engine):
        return engine._voice.speak(text, style), engine.sound_key(VOICES[0], SynthesisOptions())

    first = EmbeddedEngine(Settings(cache_dir=tmp_path / "cache"))
    first.load()
    assert first.report() == {"runtime": "onnxruntime", "next_runtime": "openvino"} and first.slots == 1
    before, key = sound(first)
    assert np.array_equal(before, on_onnxruntime)
    gate.set()
    built()
    assert first.report() == {"runtime": "openvino"} and first.slots == 1
    after, later_key = sound(first)
    assert np.array_equal(after, on_openvino)
    assert key != later_key, "nothing from the cache after the change was made before it"
    second = EmbeddedEngine(Settings(cache_dir=tmp_path / "cache"))
    second.load()
    assert second.report() == {"runtime": "openvino"}
    again, same_key = sound(second)
    assert np.array_equal(again, on_openvino) and same_key == later_key


def test_what_is_being_spoken_as_the_runtime_changes_is_spoken_to_its_end(able_cpu, tmp_path, gate, monkeypatch):
    engine, options = EmbeddedEngine(Settings(cache_dir=tmp_path)), SynthesisOptions()
    engine.load()
    alone = engine.synthesize(TEXTS["en"], VOICES[0], options)
    begun, going_on, run = threading.Event(), threading.Event(), engine._voice._network._decoder.run

    def held(*given, **options):
        begun.set()
        return going_on.wait(60) and run(*given, **options)

    monkeypatch.setattr(engine._voice._network._decoder, "run", held)
    with ThreadPoolExecutor(1) as slot:
        speaking = slot.submit(engine.synthesize, TEXTS["en"], VOICES[0], options)
        assert begun.wait(60)
        gate.set()
        built()
        assert engine.report() == {"runtime": "openvino"}
        going_on.set()
        assert np.array_equal(speaking.result(60).samples, alone.samples)


@pytest.mark.parametrize("at_once", [True, False])
def test_where_openvino_fails_it_speaks_on_onnxruntime_unless_openvino_was_asked_for(
    able_cpu, tmp_path, monkeypatch, caplog, at_once
):
    def fail(*arguments, build):
        if at_once or build:
            raise RuntimeError("no such plug-in")

    monkeypatch.setattr(embedded_voice, "open_decoder", fail)
    engine = EmbeddedEngine(Settings(cache_dir=tmp_path))
    engine.load()
    built()
    assert engine.report() == {"runtime": "onnxruntime"}
    assert "no such plug-in" in caplog.text
    assert engine.synthesize("Hello.", VOICES[0], SynthesisOptions()).seconds > 0.3
    with pytest.raises(RuntimeError, match="no such plug-in"):
        EmbeddedEngine(Settings(embedded_runtime="openvino")).load()


NOISE = np.random.default_rng(9).normal(scale=0.1, size=9_000)
HUM, TONE = (np.sin(2 * np.pi * hertz / 24_000 * np.arange(9_000)) for hertz in (50, 500))
NO_SPEECH = {
    "fails": None,
    "none": np.zeros(0),
    "no number": np.full(9_000, np.nan),
    "silent": np.zeros(9_000),
    "constant": np.full(9_000, 0.1),
    "noise": NOISE,
    "hum": 0.1 * HUM,
    "too loud": 10 * TONE,
}


@pytest.mark.parametrize("samples", NO_SPEECH.values(), ids=NO_SPEECH)
def test_where_openvino_opens_but_does_not_speak_it_is_onnxruntime_with_its_slots(
    able_cpu, tmp_path, monkeypatch, samples
):
    class Broken:
        def run(self, *arguments, **options):
            if samples is None:
                raise RuntimeError("could not create a primitive")
            return samples

    monkeypatch.setattr(embedded_voice, "open_decoder", lambda *_, build: Broken() if build else None)
    ended, threads_before = threading.Event(), threading.enumerate()
    settings = Settings(threads=3, cache_dir=tmp_path)
    speech = Speech(settings, EmbeddedEngine(settings))
    assert speech.slots == 1


    def slots():
        return [each for each in threading.enumerate() if each.name == "slot" and each not in threads_before]

    speech.on_death = ended.set
    speech.start()
    wait_until(lambda: len(slots()) == 3, deadline_s=60)
    assert speech.slots == 3
    built()
    assert speech.engine.report() == {"runtime": "onnxruntime"}
    wait_until(lambda: speech.engine._voice._network._decoder._on_one, deadline_s=60)
    monkeypatch.setattr(speech.engine, "healthy", lambda: "over")
    assert ended.wait(60), "the thread that watches it does not end"


def test_the_next_start_takes_the_decoder_that_one_before_kept(tmp_path, monkeypatch, runtimes):
    EmbeddedVoice(runtime="openvino", cache_dir=tmp_path / "cache")
    monkeypatch.delattr(embedded_openvino, "for_openvino")
    kept = EmbeddedVoice(runtime="openvino", cache_dir=tmp_path / "cache")
    for language, text in TEXTS.items():
        style = getattr(VOICES[0].embedded, language)
        assert np.array_equal(kept.speak(text, style), runtimes[1].speak(text, style))


SMALL = quantised_convolution(3, pads=(1, 1))
SIGNAL = np.random.default_rng(2).normal(size=(1, 16, 200)).astype(np.float32)


@pytest.fixture
def build(monkeypatch):
    """A small model instead of the decoder; what was built so far is in `build.models`."""

    def for_openvino(model):
        build.models.append(model)
        return ForOpenVINO(SMALL, None).result()

    def build(folder, model=b"weights"):
        return open_decoder(model, 2, folder)._model([SIGNAL])[0]

    build.models = []
    monkeypatch.setattr(embedded_openvino, "decoder_of", lambda model: model)
    monkeypatch.setattr(embedded_openvino, "for_openvino", for_openvino)
    return build


def test_a_decoder_is_built_once_for_each_model_and_the_two_used_last_stay(build, tmp_path):
    (tmp_path / "film.part").touch()
    (tmp_path / "decoder-killed.part").write_bytes(b"half")
    sounds = [build(tmp_path, model) for model in (b"a", b"a", b"b", b"a", b"c", b"c", b"a", b"b")]
    assert build.models == [b"a", b"b", b"c", b"b"]
    assert all(np.array_equal(sound, sounds[0]) for sound in sounds)
    assert len(list(tmp_path.glob("decoder-*"))) == embedded_openvino.KEPT_BUILDS
    assert (tmp_path / "film.part").exists()


@pytest.mark.parametrize("damage", [b"", b"short", b"longer than a checksum, but of nothing that was kept"])
def test_a_kept_decoder_that_is_not_whole_is_built_again(build, tmp_path, damage):
    sound = build(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert open_decoder(b"weights", 2, tmp_path, build=False) is None
    assert np.array_equal(build(tmp_path), sound)
    assert len(build.models) == 2
    assert len(file.read_bytes()) == len(whole)
    assert np.array_equal(build(tmp_path), sound)
    assert len(build.models) == 2


def test_a_kept_decoder_that_openvino_does_not_take_is_built_again(build, tmp_path):
    sound = build(tmp_path)
    (file,) = tmp_path.iterdir()
    for other in (b"of another age", whole_but_for_its_header(file)):
        embedded_openvino.keep_build(file, other)
        assert np.array_equal(build(tmp_path), sound)
    assert len(build.models) == 3


def whole_but_for_its_header(file):
    """What OpenVINO made, with letters of its header that are none."""
    return file.read_bytes()[32:][:30] + b"\xff" * 8 + file.read_bytes()[32:][38:]


@pytest.mark.parametrize("belongs", ["another", "anyone", "pipe", "link"])
def test_a_decoder_that_others_may_have_written_is_not_taken(build, tmp_path, monkeypatch, belongs):
    build(tmp_path)
    (file,) = tmp_path.iterdir()
    if belongs == "another" and os.geteuid() == 0:
        os.chown(file, 12345, -1)
    elif belongs == "another":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    elif belongs == "anyone":
        file.chmod(0o602)
    else:
        file.rename(tmp_path / "elsewhere")
        os.mkfifo(file) if belongs == "pipe" else file.symlink_to(tmp_path / "elsewhere")
    assert open_decoder(b"weights", 2, tmp_path, build=False) is None
    build(tmp_path)
    assert len(build.models) == 2


CAUSES = {"weights": b"w", "threads": 2, "version": "1", "limit": "AVX2", "cpu": "flags : avx2"}
SOURCES = dict.fromkeys(("embedded_openvino.py", "embedded_graph.py", "activation_ranges.json"), "what it says")


@pytest.mark.parametrize("change", CAUSES | SOURCES)
def test_a_decoder_that_was_kept_for_other_causes_is_not_taken(change, tmp_path, monkeypatch):
    causes = CAUSES | SOURCES
    assert [source.name for source in embedded_openvino.SOURCES] == list(SOURCES)
    monkeypatch.setattr(embedded_openvino, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(embedded_openvino, "SOURCES", [tmp_path / source for source in SOURCES])

    def name(megahertz=2400):
        (tmp_path / "cpuinfo").write_text(f"{causes['cpu']}\ncpu MHz : {megahertz}\n")
        for source in SOURCES:
            (tmp_path / source).write_text(causes[source])
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", causes["limit"])
        return fingerprint(causes["weights"], {"INFERENCE_NUM_THREADS": causes["threads"]}, causes["version"])

    before = name()
    assert name(megahertz=3300) == before
    causes[change] *= 2
    assert name() != before


def test_where_nothing_can_be_kept_it_is_said_and_it_speaks(build, tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").touch()
    sound = build(tmp_path / "file" / "cache")
    assert "Not a directory" in caplog.text
    monkeypatch.setattr(embedded_openvino, "write_whole", full)
    assert np.array_equal(build(tmp_path / "folder"), sound)
    assert "No space left" in caplog.text


def test_a_kept_decoder_that_does_not_speak_is_forgotten_and_built_again(able_cpu, tmp_path, monkeypatch, build):
    """What is kept is another model's."""
    cache = tmp_path / "cache"
    engine = EmbeddedEngine(Settings(cache_dir=cache, threads=2))
    build(cache, read_weights())
    (file,) = cache.iterdir()
    small = file.read_bytes()
    monkeypatch.undo()
    engine.load()
    assert engine.report()["runtime"] == "onnxruntime"
    built()
    assert engine.report() == {"runtime": "openvino"}
    assert file.read_bytes() != small


def test_a_kept_decoder_stays_where_onnxruntime_does_not_speak(tmp_path, monkeypatch):
    kept = tmp_path / "decoder-0.openvino"
    kept.touch()
    monkeypatch.setattr(EmbeddedVoice, "speak", lambda *_: np.zeros(9_000))
    with pytest.raises(RuntimeError, match="onnxruntime makes is not speech"):
        EmbeddedEngine(Settings(embedded_runtime="onnxruntime", cache_dir=tmp_path)).load()
    assert kept.exists()


def test_no_int8_convolution_pads_by_itself():
    """With AMX, one that does has kernels made for each length anew, in seconds and hundreds of megabytes."""
    nodes = nodes_of(for_openvino(decoder_of(read_weights())))
    convolutions = [node for node in nodes.values() if node.op_type == "Conv"]
    quantised = [node for node in convolutions if node.input[1] in nodes]  # weights in steps
    assert len(quantised) == 50
    assert not any(any(attributes_of(node).get("pads", [])) for node in quantised)


def test_a_ticket_tells_how_long_its_turn_was_waited_for(runtimes):
    voice = runtimes[1]
    alone, waiting = Ticket(), Ticket()
    voice.speak("The boats lay still.", "am_onyx", 1.0, alone)
    with voice._network._decoder._one_at_a_time:
        speaking = threading.Thread(target=voice.speak, args=("The boats lay still.", "am_onyx", 1.0, waiting))
        speaking.start()
        speaking.join(1)
        assert speaking.is_alive()
    speaking.join(30)
    assert 0 < 10 * alone.waited_s < waiting.waited_s


def test_what_is_given_up_as_it_begins_is_cancelled_and_no_fault(runtimes):
    for engine in runtimes:
        for late in range(40):
            ticket = Ticket()
            threading.Timer(late / 400, ticket.cancel).start()
            with suppress(Cancelled):  # and nothing else
                engine.speak("The boats lay still.", "am_onyx", 1.0, ticket)


def test_what_is_cancelled_leaves_nothing_behind(runtimes):
    long = "By noon the wind had turned, and nobody who knew the coast went out, not even those with the bigger boats."
    for engine in runtimes:
        alone = engine.speak("The boats lay still.", "am_onyx")
        for late in range(12):
            ticket = Ticket()
            threading.Timer(0.02 + late / 24, ticket.cancel).start()
            with suppress(Cancelled):
                engine.speak(long, "am_onyx", 1.0, ticket)
            assert np.array_equal(engine.speak("The boats lay still.", "am_onyx"), alone)
