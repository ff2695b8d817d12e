"""Measure in which range the OpenVINO decoder best quantises each tensor: every voice, both languages and mixed.

    PYTHONPATH=. python assets/measure_ranges.py        writes assets/activation_ranges.json, in a minute and a half

Where a few values are far out, 255 steps over all of them are wide: cutting those off makes less of an error on the
whole. A tensor's range is the one of its extremes, scaled, whose mean squared error is the least.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper

from embedded_graph import split, unroll_convolutions
from embedded_openvino import RANGES, ForOpenVINO
from embedded_voice import EmbeddedVoice, open_session, read_weights
from settings import Settings
from voices import Voices

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


class Histogram:
    """How often a tensor's values were seen, in bins over a range that is wide enough."""

    EDGES = np.concatenate([-np.geomspace(200, 1e-3, 4000), [0], np.geomspace(1e-3, 200, 4000)])
    MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2

    def __init__(self) -> None:
        self.counts, self.low, self.high = np.zeros(len(self.MIDDLES)), 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Count values, a text's as much as another's however long it is."""
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        self.counts += np.histogram(values, self.EDGES)[0] / values.size

    def best_range(self) -> tuple[float, float]:
        """Return the range with the least error."""
        return min(((share * self.low, share * self.high) for share in np.linspace(0.3, 1, 71)), key=self._error)

    def _error(self, ends: tuple[float, float]) -> float:
        cut_off = self.MIDDLES - np.clip(self.MIDDLES, *ends)
        step = (ends[1] - ends[0]) / 255
        return float((self.counts * cut_off**2).sum() + self.counts.sum() * step**2 / 12)


def main() -> None:
    """Measure and write."""
    _, decoder = split(read_weights())
    surgery = ForOpenVINO(decoder, None)
    surgery.result()
    seen = {tensor: Histogram() for tensor in surgery.quantised}
    session = open_session(watched(unroll_convolutions(decoder), list(seen)), 2)
    for each in features():
        for histogram, values in zip(seen.values(), session.run(None, each), strict=True):
            histogram.add(values)
    ranges = {tensor: histogram.best_range() for tensor, histogram in seen.items()}
    lines = [f"  {json.dumps(tensor)}: [{low:.4g}, {high:.4g}]" for tensor, (low, high) in ranges.items()]
    RANGES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(ranges)} tensors in {RANGES}")


if __name__ == "__main__":
    main()
