"""The reference audio: 6 to 9 s, mono, below -1 dBFS, equally loud."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

FILES = [Path(__file__).parent.parent / f"examples/voice_{number:02}.wav" for number in range(1, 12)]
sys.path.append(str(FILES[0].parent))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_reference_audio_is_fit_for_cloning(path):
    from make_examples import LUFS, loudness

    from audio import AudioChunk

    samples, rate = soundfile.read(path, dtype="float32")
    assert (samples.ndim, rate) == (1, 24_000)
    assert 6 <= len(samples) / rate <= 9
    assert 20 * np.log10(np.abs(samples).max()) < -1
    assert loudness(AudioChunk(samples, rate)) == pytest.approx(LUFS, abs=0.5)
