"""Measure in which range the OpenVINO decoder best quantises each tensor: every voice, both languages and mixed.

    PYTHONPATH=. python assets/measure_ranges.py        writes assets/activation_ranges.json, in a few minutes

Where a few values are far out, 255 steps over all of them are wide: cutting those off makes less of an error on the
whole. A tensor's range is the one of its extremes, in some frames of every text, scaled, whose mean squared error is
the least. Its channels are of different sizes, and are divided by these first, not wholly, since what they are divided
by the weights are multiplied by, and have no more steps (alpha in Xiao et al., SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper

from embedded_graph import decoder_of, unroll_convolutions
from embedded_openvino import RANGES, ForOpenVINO, Range
from embedded_voice import EmbeddedVoice, open_session, read_weights
from settings import Settings
from voices import Voices

FRAMES = 200  # of each text, by chance, so that a text counts as much as another however long it is
EVENING = 0.7  # 0 leaves the channels as they are, 1 makes all alike; from 0.5 to 0.85 the noise is the same
QUIETEST = 1e-3  # a channel that is silent has a size too
TEXTS = {
    "en": (
        "Is anybody there? Wait, don't go!",
        "She had never seen so many boats, and for a long time she simply stood at the window, counting the sails.",
        "Eight wide jugs of fizzy juice vexed the quick, plump dwarf.",
    ),
    "zh": (
        "早上好！",
        "这条河从山里流下来，经过三个村子，最后在桥边拐了一个弯，慢慢流进大海。",
        "小王，你为什么哭了？是不是把钱包弄丢了？",
    ),
    "mixed": ("我们用Python写了一个server，下午三点在Zoom上开会。",),
}


class Recorder:
    """Stands in for a decoder and keeps the features it was given."""

    def __init__(self) -> None:
        self.features: dict[str, np.ndarray] = {}

    def run(self, features: dict[str, np.ndarray], ticket: object, *, keep: bool) -> np.ndarray:
        """Keep them; return no samples."""
        self.features = features
        return np.zeros(0, np.float32)


def features() -> Iterator[dict[str, np.ndarray]]:
    """Yield what the decoder is given for every text in every voice."""
    voice, recorder = EmbeddedVoice(), Recorder()
    voice._network._decoder = recorder
    for style in (each.embedded for each in Voices.load(Settings().voices_file).voices):
        for language, texts in TEXTS.items():
            for text in texts:
                voice.speak(text, getattr(style, language))
                yield recorder.features


def watched(decoder: bytes, tensors: list[str]) -> bytes:
    """Return a serialised decoder that gives these tensors."""
    model = onnx.load_from_string(decoder)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    return model.SerializeToString()


def best_range(sample: np.ndarray) -> Range:
    """Return the range with the least error for what a tensor was seen to be, [channels, frames]."""
    loudest = np.abs(sample).max(axis=1) + QUIETEST
    sizes = np.array([float(f"{size:.2g}") for size in (loudest / loudest.max()) ** EVENING])
    even = sample / sizes[:, None]
    ends = np.array([min(even.min(), 0), even.max()])

    def error(share: float) -> float:
        step = share * np.ptp(ends) / 255
        cut_off = ((even - even.clip(*share * ends)) ** 2).mean(axis=1)
        return float(sizes**2 @ (cut_off + step**2 / 12))

    low, high = ends * min(np.linspace(0.4, 1, 31), key=error)
    return Range(float(low), float(high), sizes)


def main() -> None:
    """Measure and write."""
    decoder = decoder_of(read_weights())
    surgery = ForOpenVINO(decoder, None)
    surgery.result()
    seen: dict[str, list[np.ndarray]] = {tensor: [] for tensor in surgery.quantised}
    session = open_session(watched(unroll_convolutions(decoder), list(seen)), 2)
    for each in features():
        for sample, (values,) in zip(seen.values(), session.run(None, each), strict=True):
            sample.append(values[:, np.random.default_rng(0).integers(values.shape[1], size=FRAMES)])
    ranges = {tensor: best_range(np.concatenate(sample, axis=1)) for tensor, sample in seen.items()}
    lines = [
        f"  {json.dumps(tensor)}: [{low:.4g}, {high:.4g}, {json.dumps(sizes.tolist())}]"
        for tensor, (low, high, sizes) in ranges.items()
    ]
    RANGES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(ranges)} tensors in {RANGES}")


if __name__ == "__main__":
    main()
