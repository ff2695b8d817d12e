"""voices.json, aliases, and the settings that name files."""

import json
import logging
import os
import re
from pathlib import Path

import pytest

from engines import EmbeddedEngine
from errors import InvalidRequest
from settings import Settings, usable_cores
from voices import Voices

HERE = Path(__file__).resolve().parent
ELEVEN = ["alloy", "echo", "fable", "onyx", "nova", "shimmer", "ash", "ballad", "coral", "sage", "verse"]
WORKER_IDS = ["default", "speaker_1", "speaker_2", "speaker_3", "speaker_4", "speaker_5",
              "male_1", "male_2", "female_1", "female_2", "male_young",
              "female_young", "male_mature", "female_mature", "marin", "cedar"]  # fmt: skip


@pytest.fixture
def voices():
    """The shipped voices."""
    return Voices.load(HERE.parent / "voices.json")


def broken(tmp_path, change):
    """Write voices.json with a change made to its text; return its path."""
    path = tmp_path / "voices.json"
    path.write_text(change((HERE.parent / "voices.json").read_text()), errors="surrogateescape")
    return path


def test_the_eleven_come_in_their_order_without_aliases(client):
    for path in ("/v1/audio/voices", "/audio/voices"):
        listed = client.get(path).json["voices"]
        assert [voice["id"] for voice in listed] == ELEVEN
        assert {"id": "alloy", "name": "Alloy", "language": "multi"}.items() <= listed[0].items()


@pytest.mark.parametrize("number", range(1, 12))
def test_each_voice_has_its_reference_audio(voices, number):
    voice = voices.voices[number - 1]
    assert voice.reference_audio == f"examples/voice_{number:02}.wav"
    assert voices.of_reference(f"/srv/index-tts/examples/voice_{number:02}.wav") is voice
    assert voices.of_reference(f"C:\\x\\voice_{number:02}.wav") is voice


@pytest.mark.parametrize(
    "path", ["voice_12.wav", "voice_01.wav.bak", "xvoice_01.wav", "", "/", "voice_01.wav/", "../../etc/passwd"]
)
def test_another_path_is_nobodys_reference(voices, path):
    assert voices.of_reference(path) is None


@pytest.mark.parametrize("alias", WORKER_IDS)
def test_the_workers_ids_mean_voices(voices, alias):
    assert voices.resolve(alias).id in ELEVEN


def test_numbered_speakers_are_distinct(voices):
    assert len({voices.resolve(f"speaker_{n}").id for n in range(1, 6)}) == 5


def test_no_name_means_the_default_and_an_unknown_one_is_refused(voices):
    assert voices.resolve(None).id == "alloy"
    with pytest.raises(InvalidRequest, match="alloy, echo"):
        voices.resolve("Alloy")


@pytest.mark.parametrize(("change", "line", "reason"), [
    (lambda text: text.replace('"default"', '"default', 1), 2, "delimiter"),
    (lambda text: text.replace('"id": "echo", "name": "Echo", ', '"id": "echo", '), 8, "name"),
    (lambda text: text.replace('"id": "fable"', '"id": "echo"'), 12, "two voices have the id 'echo'"),
    (lambda text: text.replace('"marin": "', '"marin": "x'), 51, "marin"),
    (lambda text: text.replace('"voices"', '"choirs"'), 1, "voices"),
    (lambda text: re.sub('"en": [0-9.]+', '"en": Infinity', text, count=1), 4, "finite"),
    (lambda text: re.sub('"en": [0-9.]+, ', "", text, count=1), 4, "gain_db.en Field required"),
    (lambda text: text.replace('"marin"', '"echo"'), 51, "is the id of a voice"),
    (lambda text: re.sub('"en": [0-9.]+', '"en": 1e300', text, count=1), 4, "less than or equal to 20"),
])  # fmt: skip
def test_a_broken_file_is_refused_with_its_line(tmp_path, change, line, reason):
    path = broken(tmp_path, change)
    with pytest.raises(ValueError, match=reason) as caught:
        Voices.load(path)
    assert str(caught.value).startswith(f"{path}:{line}:")


@pytest.mark.parametrize("change", [lambda text: text[:200], lambda text: "[" * 200_000, lambda text: "\udcff"])
def test_a_broken_file_leaves_the_running_voices(app, tmp_path, caplog, change):
    speech = app.extensions["speech"]
    running = speech.voices
    speech.settings = Settings(voices_file=broken(tmp_path, change))
    speech.reload_voices()
    assert speech.voices == running
    assert "voices not reloaded" in caplog.text


def test_a_voice_that_the_engine_could_not_speak_leaves_the_running_ones(app, engine, tmp_path, caplog):
    def check(voice):
        if voice.embedded.en == "nobody":
            raise ValueError("no style 'nobody'")

    speech, engine.check = app.extensions["speech"], check
    running = speech.voices
    speech.settings = Settings(voices_file=broken(tmp_path, lambda text: text.replace('"am_onyx"', '"nobody"')))
    speech.reload_voices()
    assert speech.voices == running
    assert "the voice onyx: no style 'nobody'" in caplog.text


def test_a_new_voice_is_served_after_a_reload(app, client, tmp_path):
    def rename(text):
        return json.dumps({**json.loads(text), "aliases": {**json.loads(text)["aliases"], "hero": "onyx"}})

    speech = app.extensions["speech"]
    speech.settings = Settings(voices_file=broken(tmp_path, rename))
    speech.reload_voices()
    assert (
        client.post("/v1/audio/speech", json={"model": "m", "input": "a", "voice": "hero"}).headers["X-Voice"] == "onyx"
    )


def test_settings_come_from_the_environment():
    environment = {"TTS_API_KEYS": "a, b,,c", "TTS_SLOTS": "3", "TTS_UTTERANCE_TIMEOUT_S": "1.5", "HOME": "/x"}
    settings = Settings.from_env(environment)
    assert (settings.api_keys, settings.slots, settings.utterance_timeout_s) == (("a", "b", "c"), 3, 1.5)
    assert settings.voices_file.name == "voices.json"


@pytest.mark.parametrize(("name", "value"), [
    ("TTS_SLOTS", "many"), ("TTS_SLOTS", "-1"), ("TTS_ENGINE", "magic"), ("TTS_MAX_BODY_BYTES", "1"),
    ("TTS_API_KEYS", " , "), ("TTS_API_KEYS", "ключ"),
])  # fmt: skip
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: ") as caught:
        Settings.from_env({name: value})
    assert (value in str(caught.value)) == (name != "TTS_API_KEYS"), "keys are shown to nobody"


@pytest.mark.parametrize(
    ("cgroup", "quota", "cores"),
    [
        ("0::/\n", "max 100000", 6), ("0::/\n", "250000 100000", 2), ("0::/\n", "50000 100000", 1),
        ("0::/\n", "800000 100000", 6), ("0::/\n", None, 6), ("4:cpu:/\n", "250000 100000", 6), (None, None, 6),
        ("1:name=systemd:/\n0::/system.slice/tts.service\n", "300000 100000", 3),
    ],
)  # fmt: skip
def test_the_cores_are_those_that_a_container_or_a_unit_leaves(tmp_path, monkeypatch, cgroup, quota, cores):
    monkeypatch.setattr("settings.OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr("settings.CGROUPS", tmp_path / "all")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5, 7})
    if cgroup:
        (tmp_path / "own").write_text(cgroup)
        folder = tmp_path / "all" / cgroup.split("0::/")[-1].strip()
        folder.mkdir(parents=True)
        if quota:
            (folder / "cpu.max").write_text(quota + "\n")
    assert usable_cores() == cores
    assert EmbeddedEngine(Settings(embedded_runtime="onnxruntime")).slots == min(4, cores)


def test_an_unknown_setting_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        Settings.from_env({"TTS_SLOT": "3"})
    assert "TTS_SLOT" in caplog.text and "TTS_SLOTS" in caplog.text
