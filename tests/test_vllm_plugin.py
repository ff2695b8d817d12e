"""The vLLM plug-in: found where it lies, harmless in the worker, and the death of a spawned process with its parent."""

import ctypes
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vllm_plugin
from vllm_engine import PLUGIN, is_alive

HERE = Path(vllm_plugin.__file__).parent
PR_GET_PDEATHSIG = 2  # linux/prctl.h
SPAWN = """
import multiprocessing, time
import vllm_plugin

def child(told):
    vllm_plugin.register()
    told.send(True)
    time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()  # so that a child that fails ends the waiting
    ours.recv()
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_engine_in_use(monkeypatch):
    """Take out what the tests of an engine may have left in the environment."""
    for name in (vllm_plugin.CHECKOUT_VARIABLE, vllm_plugin.OMNI_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def parent(tmp_path):
    """A process whose spawned child has registered; the id of the child beside it."""
    script = tmp_path / "parent.py"
    script.write_text(SPAWN)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as process:
        yield process, int(process.stdout.readline())
        process.kill()


def test_vllm_finds_the_plugin_because_it_lies_beside_the_app():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN)
    assert found.load() is vllm_plugin.register


def test_a_spawned_process_dies_with_its_parent(parent):
    process, child = parent
    assert is_alive(child)
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 2
    while is_alive(child):
        assert time.monotonic() < end, "the child outlives its parent"
        time.sleep(0.01)


def test_the_worker_itself_does_not_die_with_gunicorn():
    vllm_plugin.register()
    asked = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(asked))
    assert asked.value == 0


def test_no_checkout_is_touched_where_none_is_in_use(monkeypatch):
    monkeypatch.setattr(vllm_plugin, "register_indextts", lambda checkout: pytest.fail(checkout))
    vllm_plugin.register()


@pytest.fixture
def imports(monkeypatch):
    """Forget afterwards what a test imports."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_checkout_in_use_is_registered_and_mended(monkeypatch, tmp_path, imports):
    (tmp_path / "patch_vllm.py").write_text("applied = True\n")
    model = tmp_path / "indextts" / "gpt" / "index_tts_gpt2_vllm_v1.py"
    model.parent.mkdir(parents=True)
    for package in (model.parent, model.parent.parent):
        (package / "__init__.py").touch()
    model.write_text("class GPT2TTSModel: pass\n")
    monkeypatch.setenv(vllm_plugin.CHECKOUT_VARIABLE, str(tmp_path))
    vllm_plugin.register()
    from indextts.gpt.index_tts_gpt2_vllm_v1 import GPT2TTSModel

    assert sys.modules["patch_vllm"].applied
    assert GPT2TTSModel.embed_input_ids is vllm_plugin.embed_input_ids
    assert GPT2TTSModel.compute_logits is vllm_plugin.compute_logits


@pytest.fixture
def merged(monkeypatch):
    """What vLLM's merge of prompts into embeddings is given."""
    given = []
    utils = SimpleNamespace(_merge_multimodal_embeddings=lambda *what: given.append(what) or "merged")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.utils", utils)
    return given


def test_an_audio_code_0_is_no_place_for_a_prompt(merged):
    model = SimpleNamespace(audio_emb=lambda ids: ids * 10)
    ids, places = np.array([0, 0, 7]), np.array([True, False, False])
    assert vllm_plugin.embed_input_ids(model, ids, ["prompt"], is_multimodal=places) == "merged"
    [(embeddings, prompts, where)] = merged
    assert (embeddings == [0, 0, 70]).all() and prompts == ["prompt"] and where is places


def test_codes_alone_are_embedded(merged):
    model = SimpleNamespace(audio_emb=lambda ids: ids * 10)
    assert (vllm_plugin.embed_input_ids(model, np.array([0, 7])) == [0, 70]).all() and not merged


def test_the_scores_have_their_bias():
    head = SimpleNamespace(bias="bias")
    model = SimpleNamespace(lm_head=head, logits_processor=lambda *given: given)
    assert vllm_plugin.compute_logits(model, "states") == (head, "states", "bias")


@pytest.mark.parametrize("below", [".", "checkpoints", None])
def test_the_emotion_model_loads_with_the_talker_where_it_is_there(tmp_path, below):
    if below:
        (tmp_path / below / vllm_plugin.EMOTION_MODEL).mkdir(parents=True)
        (tmp_path / below / vllm_plugin.EMOTION_MODEL / "config.json").touch()
    loaded, matrices = [], []
    talker = SimpleNamespace(model_path=str(tmp_path), _ensure_matrix_loaded=lambda *what: matrices.append(what[:2]))
    vllm_plugin.with_emotions(lambda *_: loaded.append("others"), lambda *what: loaded.append(what))(talker, "cuda:0")
    assert matrices == [("_emo_matrix", "emo_matrix"), ("_spk_matrix", "spk_matrix")]
    assert loaded == ["others", *([(str(tmp_path), "cuda:0")] if below else [])]


def test_the_emotion_model_does_not_sample():
    settings = SimpleNamespace(do_sample=True, temperature=0.6)
    settings.update = lambda **given: vars(settings).update(given)
    model, tokenizer = SimpleNamespace(generation_config=settings), object()
    assert vllm_plugin.without_sampling(lambda path: (model, tokenizer))("weights") == (model, tokenizer)
    assert not settings.do_sample and settings.temperature is None
    assert vllm_plugin.without_sampling(lambda path: (None, None))("weights") == (None, None)


@pytest.mark.parametrize("answer", ["[1, 2]", "null", '{"高兴": null}'])
def test_what_the_emotion_model_says_wrongly_is_calm(answer):
    def predict(self, text, device):
        return [min(1.2, value) for value in dict(json.loads(answer)).values()]

    assert vllm_plugin.calm_at_worst(predict)(None, "怒", "cpu") == vllm_plugin.CALM


def test_what_the_emotion_model_says_is_kept():
    assert vllm_plugin.calm_at_worst(lambda self, text, device: [0.5] * 8)(None, "怒", "cpu") == [0.5] * 8
