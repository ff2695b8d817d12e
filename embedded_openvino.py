"""The embedded voice's decoder on OpenVINO: int8 convolutions, each with what follows it in one kernel.

On onnxruntime half the time goes to the operators between the convolutions, each of which reads and writes the whole
signal. OpenVINO fuses chains of simple operators into the convolution before them. So the graph is put in its terms:
weights back to numbers and to int8 again; the generator's activations to uint8 in fixed ranges, each channel by its
own size (assets/activation_ranges.json, found by assets/measure_ranges.py); the convolutions before it as products; a
norm and the snake after it in terms of what comes before them; sin^2 as a chain of simple operators; what makes the
signal longer as a product; the int8 convolutions, and what lies between them, in four dimensions. Against float32 the
noise is 20 dB down, on onnxruntime 15. Measured on 2 cores, utterances of a text one by one: with AVX512-VNNI 7.9 times
real time instead of 4.6 (`make bench-threads`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, helper

import embedded_graph
from embedded_graph import FEATURES, SCALE, SNAKE, Surgery, attributes_of, decoder_of, refill
from files import write_whole
from scheduling import Ticket
from settings import CPU_INFO

if TYPE_CHECKING:
    import openvino

log = logging.getLogger("speech.embedded")
Config = dict[str, str | int | bool]  # OpenVINO's settings

RANGES = Path(__file__).resolve().parent / "assets" / "activation_ranges.json"
SOURCES = Path(__file__), Path(embedded_graph.__file__), RANGES  # of a build, beside the weights
INPUTS = dict(zip((*FEATURES, "style"), ([1, 512, None], [1, None], [1, None], [1, 256]), strict=True))
GENERATOR = "/generator/"  # in the names of its tensors: nine tenths of the decoder's work
MIN_OUTPUTS, MIN_CHANNELS = 64, 22  # a smaller convolution gains nothing from int8 and would lose what it draws
SMALLEST_GAIN = 1e-20  # of a norm, as it is divided by
SMALLEST = 1e-8  # scale of weights that are all zero
PLAIN = {"strides": [1], "dilations": [1], "group": 1}  # attributes of a convolution that is a matrix product

_QUANTISED = ("DynamicQuantizeLinear", "x")
_CONVOLUTION = ("ConvInteger", _QUANTISED, "WEIGHT", "zero", "WEIGHT_ZERO")
_BIAS = ("Reshape", ("Cast", ("Floor", ("Div", "BIAS", "steps"))), "SHAPE")
CONVOLUTIONS = (
    ("Mul", ("Cast", ("Add", _CONVOLUTION, _BIAS)), SCALE),
    ("Mul", ("Cast", _CONVOLUTION), SCALE),
)
PRODUCT = ("Mul", ("Cast", ("MatMulInteger", _QUANTISED, "WEIGHT", "zero", "WEIGHT_ZERO")), SCALE)
ELEMENTWISE = (
    "Abs", "Add", "Sub", "Mul", "Div", "Mod", "Pow", "Sqrt", "Max", "LeakyRelu", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
# Kernels are compiled for each length anew. Those of some twenty lengths stay, 130 MB: one met again takes 0.85 of the
# time, and most utterances have one of twenty (embedded_voice.py's STEP_FRAMES).
KEPT_KERNELS = 1000
KEPT_BUILDS = 2  # decoders in the cache folder, 72 MB each: this release's, and the one that a rollback goes back to


class Range(NamedTuple):
    """What a tensor's channels lie between once each is divided by its size; sizes: float32 [channels], up to 1."""

    low: float
    high: float
    sizes: np.ndarray


Ranges = Mapping[str, Range]


class OpenVINODecoder:
    """Makes samples of features, one utterance at a time on all of its cores."""

    def __init__(self, model: openvino.CompiledModel):
        self._model = model
        self._one_at_a_time = Lock()

    def run(self, features: dict[str, np.ndarray], ticket: Ticket, *, keep: bool) -> np.ndarray:
        """Return the samples [n]; raise RuntimeError where the ticket was cancelled before its turn came.

        What has begun, half a second as a rule, on a slow machine one to five, is made to its end: a run that OpenVINO
        cancels leaves its lengths behind in the graph, and the next one fails over them.
        """
        asked = time.perf_counter()
        with self._one_at_a_time:
            ticket.waited_s += time.perf_counter() - asked
            if ticket.cancelled:
                raise RuntimeError("cancelled before it began")
            request = self._model.create_infer_request()
            try:
                request.infer(features)
                return request.get_output_tensor().data.ravel().copy()
            finally:
                if not keep:
                    self._model.release_memory()


def open_decoder(
    model: bytes, threads: int, cache_dir: Path | None = None, *, build: bool = True
) -> OpenVINODecoder | None:
    """Return a model's decoder: as a start before kept it in a folder, else built, in seconds, and kept.

    Where it is not to be built now, None instead.
    """
    from quiet_openvino import openvino  # not needed where the CPU has no use for it

    core, settings = openvino.Core(), config(threads)
    file = cache_dir and cache_dir / f"decoder-{fingerprint(model, settings, openvino.__version__)}.openvino"
    compiled = (file and kept(core, settings, file)) or (build and built(core, settings, model, file))
    return OpenVINODecoder(compiled) if compiled else None


def config(threads: int) -> Config:
    """Return OpenVINO's settings for one utterance at a time on so many cores."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not int8; OpenVINO would take bf16 where the CPU has it
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,  # with VNNI, what an int8 matrix multiplies has a scale for each 32
        "CPU_RUNTIME_CACHE_CAPACITY": KEPT_KERNELS,
        "ENABLE_CPU_PINNING": False,
    }


def kept(core: openvino.Core, settings: Config, file: Path) -> openvino.CompiledModel | None:
    """Return the decoder that a file keeps, if it is one."""
    if build := read_build(file):
        with contextlib.suppress(Exception):  # what is not OpenVINO's fails in more than one way
            decoder = core.import_model(build, "CPU", settings)
            log.info("the decoder is the one kept in %s", file)
            return decoder
    return None


def built(core: openvino.Core, settings: Config, model: bytes, file: Path | None) -> openvino.CompiledModel:
    """Build a model's decoder, and keep it in a file."""
    log.info("building the decoder for this CPU, 1 of 2: its graph")
    graph = core.read_model(for_openvino(decoder_of(model)))
    log.info("building the decoder for this CPU, 2 of 2: its kernels")
    decoder = core.compile_model(graph, "CPU", settings)
    if file:
        keep_build(file, decoder.export_model().getvalue())
    return decoder


def fingerprint(model: bytes, settings: Config, version: str) -> str:
    """Return a name for all that shapes a build: weights, this code, the settings, OpenVINO's version, the CPU."""
    cpu = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    cpu = sorted({line for line in cpu if line.startswith(("flags", "model name"))})
    digest = hashlib.sha256(repr((settings, version, os.environ.get("ONEDNN_MAX_CPU_ISA"), cpu)).encode())
    for content in (model, *(source.read_bytes() for source in SOURCES)):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def read_build(file: Path) -> bytes | None:
    """Return what keep_build() wrote; None where it is not there, not whole, or another user's: it is code to run."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as opened:
            status = os.fstat(handle)
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            content = opened.read()
        with contextlib.suppress(OSError):  # a folder that is only to be read
            os.utime(file)  # the longest unused are removed first
    except OSError:
        return None
    digest, build = content[:32], content[32:]
    return build if hashlib.sha256(build).digest() == digest else None


def keep_build(file: Path, build: bytes) -> None:
    """Write a build with its checksum in place of the longest unused; where the folder does not take it, say so."""
    try:
        others = sorted(file.parent.glob("decoder-*"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in others[KEPT_BUILDS - 1 :]:
            old.unlink(missing_ok=True)
        write_whole(file, hashlib.sha256(build).digest() + build)
        log.info("the decoder is kept in %s for the next start", file)
    except OSError as error:
        log.warning("the decoder is not kept in %s, so the next start builds it again: %s", file, error)


def forget_builds(cache_dir: Path) -> None:
    """Remove what is kept: it was whole, and yet did not speak."""
    with contextlib.suppress(OSError):
        for build in cache_dir.glob("decoder-*"):
            build.unlink(missing_ok=True)


def for_openvino(model: bytes) -> bytes:
    """Return the serialised decoder in the terms of OpenVINO."""
    return ChannelsLast(ForOpenVINO(Snakes(model).result(), read_ranges()).result()).result()


def read_ranges() -> Ranges:
    """Return what each quantised tensor's values lie between."""
    found = json.loads(RANGES.read_text())
    return {name: Range(low, high, np.array(sizes, np.float32)) for name, (low, high, sizes) in found.items()}


class Snakes(Surgery):
    """A norm and the snake activation after it: two sums over the signal, and four passes over it instead of seven.

    The norm is ax + b, of a = gain / deviation and b = bias - a mean, which are numbers of a channel. So the snake
    y + sin(cy)^2 / c of y = ax + b is (sin(acx + bc)^2 / ac + x) a + b, and y need not be written down.
    A variance so found loses digits where the mean is many deviations, a hundred in the worst channel: in the sound
    that is 50 to 70 dB down, and int8 is 20.
    """

    def rewrite(self, node: NodeProto) -> bool:
        """Replace a snake whose input is a norm."""
        found: dict[str, str] = {}
        if not self.match(node, SNAKE, found):
            return False
        x, rate = found["x"], self.array(found["ALPHA"]) / np.pi
        a, b = self.norm(x, found)
        half_turns = self.op("Add", self.op("Mul", x, self.op("Mul", a, rate)), self.op("Mul", b, rate))
        wave = self.op("Mul", self.sine_squared(half_turns), self.op("Div", found["INVERSE_ALPHA"], a))
        self.op("Add", self.op("Mul", self.op("Add", wave, x), a), b, output=node.output[0])
        return True

    def sine_squared(self, half_turns: str) -> str:
        """Append sin(pi t)^2 = cos(pi y)^2 of y = |t| less its whole part and a half, the cosine by a parabola of y^2.

        Off by 4e-4 at most; a cosine doubled up from a sixteenth of the angle took three times as long.
        """
        a, b, c = (number(term) for term in cosine_terms())
        y = self.op("Add", self.op("Abs", self.op("Mod", half_turns, number(1), fmod=1)), number(-0.5))
        parabola = self.op("Pow", self.op("Add", self.op("Pow", y, number(2)), a), number(2))
        return self.op("Pow", self.op("Add", self.op("Mul", parabola, b), c), number(2))

    def norm(self, x: str, found: dict[str, str]) -> tuple[str, str]:
        """Append a and b, [1, channels, 1] each: the variance is what the mean square is over the squared mean."""
        time = np.array([2])
        frames = self.op("Cast", self.op("Shape", x, start=2, end=3), to=onnx.TensorProto.FLOAT)
        mean, length = self.op("ReduceMean", x, time), self.op("ReduceL2", x, time)
        square = self.op("Div", self.op("Mul", length, length), self.op("Reshape", frames, np.array([1, 1, 1])))
        variance = self.op("Max", self.op("Sub", square, self.op("Mul", mean, mean)), number(0))
        deviation = self.op("Sqrt", self.op("Add", variance, found["EPSILON"]))
        a = self.op("Add", self.op("Div", found["gain"], deviation), number(SMALLEST_GAIN))
        return a, self.op("Sub", found["bias"], self.op("Mul", a, mean))


class ForOpenVINO(Surgery):
    """onnxruntime's integer operators to float ones, int8 convolutions and products with int8 matrices.

    `quantised` lists the tensors that the convolutions read. Without ranges it is float32 throughout.
    """

    def __init__(self, model: bytes, ranges: Ranges | None):
        super().__init__(model)
        self.ranges = ranges
        self.quantised: list[str] = []
        self._attributes: dict[str, dict] = {}  # a convolution's, by the name of its weight

    def result(self) -> bytes:
        """Rewrite, give the inputs their shapes, which OpenVINO wants to know, and serialise."""
        for value in self.model.graph.input:
            if shape := INPUTS.get(value.name):
                named = [size or f"{value.name}.length" for size in shape]
                value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, named))
        return super().result()

    def rewrite(self, node: NodeProto) -> bool:
        """Replace what there is a float or int8 form of."""
        if node.op_type == "ConvInteger":
            self._attributes[node.input[1]] = attributes_of(node)
        return self.convolution(node) or self.product(node) or self.longer(node) or self.stft(node)

    def convolution(self, node: NodeProto) -> bool:
        """ConvInteger with its scale and bias -> Conv."""
        for pattern in CONVOLUTIONS:
            found: dict[str, str] = {}
            if self.match(node, pattern, found):
                bias = [self.array(found["BIAS"]).ravel()] if "BIAS" in found else []
                step = float(self.array(found["WEIGHT_SCALE"]).max())
                options = self._attributes[found["WEIGHT"]]
                self.convolve(found["x"], self.weight(found), *bias, step=step, output=node.output[0], **options)
                return True
        return False

    def convolve(
        self, x: str, weight: np.ndarray, *bias: np.ndarray, step: float = 0, output: str = "", **attributes
    ) -> str:
        """Append a convolution with weights [outputs, channels, width], multiples of `step`, in int8 where that pays.

        In fixed ranges what comes before the generator would add 1.5 dB of noise.
        """
        outputs, channels, _ = weight.shape
        if outputs >= MIN_OUTPUTS and channels >= MIN_CHANNELS:
            if GENERATOR in x:
                self.quantised.append(x)
                if self.ranges:
                    x, weight = self.evened(x, weight, self.ranges[x], attributes["pads"])
                    attributes["pads"] = [0, 0]
            elif all(attributes[name] == PLAIN[name] for name in PLAIN):
                frames = self.unrolled(x, weight, *bias, step=step, pads=attributes["pads"])
                return self.op("Transpose", frames, perm=[0, 2, 1], output=output)
        return self.op("Conv", x, weight, *bias, output=output, **attributes)

    def unrolled(self, x: str, weight: np.ndarray, *bias: np.ndarray, pads: list[int], step: float = 0) -> str:
        """Append a convolution as the product of every output frame's input frames, side by side, and a matrix.

        Its output is [1, n, outputs]. With VNNI, OpenVINO quantises the frames as it goes, each 32 values by
        themselves, else it multiplies floats; it keeps the matrix in int8. Before the generator that is less than
        0.1 dB more noise, and 168 MB less.
        """
        outputs, channels, width = weight.shape
        frames = self.op("Transpose", x, perm=[0, 2, 1])
        if any(pads):
            frames = self.op("Pad", frames, np.array([0, pads[0], 0, 0, pads[1], 0]))
        if width > 1:
            ends = [*range(1 - width, 0), np.iinfo(np.int64).max]
            shifted = [self.op("Slice", frames, *np.array([[tap], [end], [1]])) for tap, end in enumerate(ends)]
            frames = self.op("Concat", *shifted, axis=2)
        matrix = self.signed(weight.transpose(0, 2, 1).reshape(outputs, -1), step)
        y = self.op("MatMul", frames, self.op("Transpose", matrix, perm=[1, 0]))
        return self.op("Add", y, bias[0]) if bias else y

    def evened(self, x: str, weight: np.ndarray, limits: Range, pads: list[int]) -> tuple[str, str | np.ndarray]:
        """Append a tensor's passage through uint8, whose range covers zero, with its padding, and the weights in int8.

        Each channel is divided by its size, its weights multiplied: so a low one is not lost in a loud one's steps
        (Xiao et al., SmoothQuant, 2023), which with the products in `longer` makes 3 dB less noise.
        A convolution that itself pads by more than it has taps, as most dilated ones do, takes 1.8 times as long with
        AVX-512: oneDNN has none of its faster routines for that. With AMX, kernels for one that itself pads are made
        anew for each length, in seconds and hundreds of megabytes.
        """
        low, high, sizes = limits
        step = (high - low) / 255
        scale, zero = np.array(step, np.float32), np.array(round(-low / step), np.uint8)
        even = self.op("Mul", x, (1 / sizes[None, :, None]).astype(np.float32))
        steps = self.op("QuantizeLinear", even, scale, zero)
        steps = self.op("Pad", steps, np.array([0, 0, pads[0], 0, 0, pads[1]]), zero)
        x = self.op("DequantizeLinear", steps, scale, zero)
        weight = weight * sizes[:, None]
        # A CPU without VNNI adds each two products in 16 bits: so two neighbours are within 128 steps together. That is
        # not heard anywhere: what int8 weights add is 20 dB below what uint8 activations do.
        return x, self.signed(weight, largest_pair(weight) / 128)

    def signed(self, weight: np.ndarray, step: float | np.ndarray) -> str | np.ndarray:
        """Append weights in int8, a scale for each output: exact where all of an output's are within 127 steps.

        step: the least scale, of all or of each. Without ranges return the weights as they are.
        """
        if not self.ranges:
            return weight
        scale = np.maximum(largest(weight) / 127, step).clip(min=SMALLEST).astype(np.float32)
        steps = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        return self.op("DequantizeLinear", steps, scale, np.zeros(len(scale), np.int8), axis=0)

    def product(self, node: NodeProto) -> bool:
        """MatMulInteger with its scale -> MatMul."""
        found: dict[str, str] = {}
        if not self.match(node, PRODUCT, found):
            return False
        self.op("MatMul", found["x"], self.weight(found), output=node.output[0])
        return True

    def weight(self, found: dict[str, str]) -> np.ndarray:
        """Return the weight that a pattern found, as the numbers it stands for."""
        steps, zero, scale = (self.array(found[name]) for name in ("WEIGHT", "WEIGHT_ZERO", "WEIGHT_SCALE"))
        return (steps.astype(np.float32) - zero) * scale

    def longer(self, node: NodeProto) -> bool:
        """ConvTranspose over two strides -> a product of each two frames that gives the stride between their middles.

        In fixed ranges of uint8 the decoder's two would make a quarter of the noise.
        """
        if node.op_type != "ConvTranspose" or node.input[1] not in self.constants:
            return False
        kernels, attributes = self.array(node.input[1]), attributes_of(node)
        channels, outputs, width = kernels.shape
        stride, half = width // 2, width // 4
        sizes = {"kernel_shape": [2 * stride], "strides": [stride], "pads": [half] * 2, "output_padding": [0]}
        if not half or any(attributes.get(name, value) != value for name, value in {**PLAIN, **sizes}.items()):
            return False
        taps = kernels.reshape(channels, outputs, 2, stride)[:, :, ::-1]  # of the frame before, then of this one
        weight = taps.transpose(3, 1, 0, 2).reshape(-1, channels, 2)
        y = self.unrolled(node.input[0], weight, np.tile(self.array(node.input[2]), stride), pads=[1, 1])
        y = self.op("Reshape", y, np.array([1, -1, outputs]))
        y = self.op("Slice", y, *np.array([[half], [-half], [1]]))
        self.op("Transpose", y, perm=[0, 2, 1], output=node.output[0])
        return True


class ChannelsLast(Surgery):
    """Int8 convolutions, and elementwise nodes, sums over time and padding after them, as [1, channels, 1, n].

    Only in four does OpenVINO keep a sample's channels side by side from one convolution to the next; in three it turns
    every signal round and back. A decoder's run takes 0.95 of the time.
    """

    def __init__(self, model: bytes):
        super().__init__(model)
        self.wide: set[str] = set()  # the tensors of four dimensions
        self._converted: dict[tuple[str, str], str] = {}

    def rewrite(self, node: NodeProto) -> bool:
        """Widen an int8 convolution, or one of the simple nodes after it; all others read in three what has four."""
        if self.is_int8(node):
            self.widen_convolution(node)
        elif self.wide.isdisjoint(node.input):
            return False
        elif node.op_type in ("ReduceMean", "ReduceL2"):  # over time
            node.input[1] = self.constant(np.array([3]))
        elif node.op_type == "Pad":
            node.input[1] = self.constant(np.insert(self.array(node.input[1]), (2, 5), 0))
        elif node.op_type == "Shape":
            self.ask_for_last(node)
            return True
        elif node.op_type in ELEMENTWISE:
            refill(node.input, [self.widened(name) for name in node.input])
        else:
            refill(node.input, [self.once("Squeeze", name) if name in self.wide else name for name in node.input])
            return False
        self.wide.update(node.output)
        self.keep(node)
        return True

    def ask_for_last(self, node: NodeProto) -> None:
        """Append a Shape with its start and its end one further."""
        for attribute in node.attribute:
            attribute.i += 1
        self.keep(node)

    def is_int8(self, node: NodeProto) -> bool:
        """Tell whether it is a convolution with int8 weights."""
        weight = self.maker.get(node.input[1]) if node.op_type == "Conv" else None
        return weight is not None and weight.op_type == "DequantizeLinear"

    def widen_convolution(self, node: NodeProto) -> None:
        """Give a convolution a height of one."""
        steps, *scale_and_zero = self.maker[node.input[1]].input
        kernels = self.op("DequantizeLinear", self.array(steps)[:, :, None], *scale_and_zero, axis=0)
        refill(node.input, [self.widened(node.input[0]), kernels, *node.input[2:]])
        for attribute in node.attribute:
            if attribute.name == "pads":
                before, after = attribute.ints
                refill(attribute.ints, [0, before, 0, after])
            elif attribute.ints:  # strides, dilations, kernel_shape
                refill(attribute.ints, [1, *attribute.ints])

    def widened(self, name: str) -> str:
        """Return a tensor with a dimension before its last; a constant of fewer than three, a number, as it is."""
        if name in self.wide:
            return name
        if name not in self.constants:
            return self.once("Unsqueeze", name)
        value = self.array(name)
        return self.constant(value[:, :, None]) if value.ndim == 3 else name

    def once(self, kind: str, name: str) -> str:
        """Append Squeeze or Unsqueeze, once for all who read it."""
        if (kind, name) not in self._converted:
            self._converted[kind, name] = self.op(kind, name, np.array([2]))
        return self._converted[kind, name]


def largest(weight: np.ndarray) -> np.ndarray:
    """Return each output's largest weight, of either sign."""
    return np.abs(weight).reshape(len(weight), -1).max(axis=1)


def largest_pair(weight: np.ndarray) -> np.ndarray:
    """Return the most that each output's weights of one sign come to in two neighbouring channels of an even number."""
    halves = weight.clip(min=0), weight.clip(max=0)
    return np.maximum(*(largest(half[:, ::2] + half[:, 1::2]) for half in halves))


def number(value: float) -> np.ndarray:
    """Return a float32 scalar."""
    return np.array(value, np.float32)


@cache
def cosine_terms() -> tuple[float, float, float]:
    """Return a, b and c of cos(pi y) = b (y^2 + a)^2 + c for y up to 0.5, so that its square is nearest."""
    y = np.linspace(0, 0.5, 401)
    cosine = np.cos(np.pi * y)
    (b, middle, last), *_ = np.linalg.lstsq(np.stack([y**4, y**2, y**0], 1) * cosine[:, None], cosine**2, rcond=None)
    a = middle / (2 * b)
    return float(a), float(b), float(last - b * a * a)
