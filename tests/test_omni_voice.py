"""omni_voice.py and omni_model.py without vLLM: wrong settings, missing files, languages; tests/omni has the rest."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest

import omni_voice
from omni_model import (
    CAMPPLUS,
    CAMPPLUS_PLACES,
    KINDS,
    LoadError,
    check_weights,
    complete,
    explain,
    fetched,
    find_kind,
)
from omni_voice import OmniVoice


def create(model, deploy_config=None):
    """Try to load a model."""
    return asyncio.run(OmniVoice.create(str(model), deploy_config, 0.25))


@pytest.fixture(params=KINDS)
def model(request, tmp_path):
    """A folder that looks like a model, with empty files."""
    kind = KINDS[request.param]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.model_type}))
    for name in kind.weights:
        (tmp_path / name).touch()
    return tmp_path


def test_a_model_that_is_not_set_is_asked_for():
    with pytest.raises(LoadError, match="TTS_MODEL is not set"):
        create("")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", __file__])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(LoadError, match=f"TTS_MODEL: there is no folder {path}"):
        create(path)


@pytest.mark.parametrize("config", ['{"model_type": "qwen3"}', "{}", "[]", "no json", None])
def test_a_folder_with_another_model_is_told(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LoadError, match="TTS_MODEL: .*config.json"):
        create(tmp_path)


def test_missing_weights_are_named(model):
    (model / "gpt.pth").unlink()
    (model / "feat2.pt").unlink()
    with pytest.raises(LoadError, match="lacks gpt.pth, feat2.pt of IndexTTS-2"):
        create(model)


def test_a_missing_deploy_file_is_named(model, tmp_path):
    with pytest.raises(LoadError, match="TTS_OMNI_DEPLOY_CONFIG: there is no file"):
        create(model, tmp_path / "deploy.yaml")


def test_missing_packages_are_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    with pytest.raises(LoadError, match="TTS_ENGINE=omni needs the packages vllm and vllm-omni"):
        create(model)


def test_a_missing_gpu_is_told(model, monkeypatch):
    monkeypatch.setattr(omni_voice, "sees_gpu", lambda: False)  # before vllm_omni, which is not there, is imported
    with pytest.raises(LoadError, match="torch sees no GPU"):
        create(model)


def test_the_two_models_are_told_apart_with_and_without_a_config(model):
    kind = find_kind(model)
    assert kind.model_type == json.loads((model / "config.json").read_text())["model_type"]
    (model / "config.json").unlink()
    assert find_kind(model) == kind


def test_a_model_2_5_that_comes_with_the_tokenizer_of_2_is_none_of_2(model):
    kind = find_kind(model)
    (model / "config.json").write_text("{}")
    (model / "bpe.model").touch()
    assert find_kind(model) == kind


def test_weights_may_lie_in_a_folder_of_their_own(model):
    (model / "checkpoints").mkdir()
    for name in KINDS["indextts2"].weights + KINDS["indextts2_5"].weights:
        if (model / name).exists():
            (model / name).rename(model / "checkpoints" / name)
    check_weights(model, find_kind(model))


@pytest.mark.parametrize(
    "text, language",
    [
        ("Hello world.", "en"), ("你好，world。", "zh"), ("こんにちは、世界。", "ja"), ("مرحبا بالعالم", "ar"),
        ("¿Qué tal?", "es"), ("El perro y los gatos", "es"), ("El Paso, Texas", "en"), ("Los Angeles", "en"),
        ("123", "en"), ("", "en"),
    ],
)  # fmt: skip
def test_the_language_of_an_utterance_is_found(text, language):
    assert omni_voice.language(text) == language


@pytest.mark.parametrize(
    "error, advice",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."), "Lower"),
        (ValueError("Free memory on device (1.2/24.0 GiB) on startup is less than desired"), "Lower"),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."), "Raise"),
        (ValueError("To serve at least one request with the model's max seq len, 1.5 GiB KV cache is needed"), "Raise"),
        (RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}"), "raise"),
    ],
)
def test_short_memory_names_the_setting(error, advice):
    try:
        raise RuntimeError("Orchestrator initialization failed") from error
    except RuntimeError as raised:
        assert f"{advice} TTS_GPU_MEMORY_UTILIZATION" in explain(raised, [])


def test_another_error_at_the_start_is_told_as_it_is():
    assert explain(KeyError("gpt"), []) == "vLLM-Omni did not start with TTS_MODEL: 'gpt'"


def test_a_deploy_file_has_the_say_over_memory():
    told = explain(RuntimeError("CUDA out of memory"), [], omni_voice.DEPLOYED_SHARE)
    assert "Lower gpu_memory_utilization in TTS_OMNI_DEPLOY_CONFIG" in told


def test_what_vllm_omni_fetches_is_named_where_a_stage_does_not_start(model, caplog):
    caplog.set_level("INFO", "speech.omni")
    (model / "bigvgan").mkdir()
    check_weights(model, find_kind(model))
    assert "facebook/w2v-bert-2.0" in caplog.text and "nvidia/bigvgan" not in caplog.text
    assert "download facebook/w2v-bert-2.0" in explain(RuntimeError("See root cause above"), fetched(model))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub's client that gives CAMPPlus, or nothing where the test takes the file away."""
    file = tmp_path / "hub" / CAMPPLUS
    file.parent.mkdir()
    file.write_text("weights")

    def fetch(*what):
        assert what == ("funasr/campplus", CAMPPLUS)
        return str(file.resolve(strict=True))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=fetch))
    return file


def test_campplus_is_laid_beside_weights_that_come_without_it(model, hub, tmp_path_factory):
    whole = complete(model, find_kind(model), tmp_path_factory.mktemp("scratch"))
    assert whole != model and (whole / CAMPPLUS).read_text() == "weights"
    assert {path.name for path in whole.iterdir()} == {CAMPPLUS, *(path.name for path in model.iterdir())}
    assert (whole / "config.json").samefile(model / "config.json")


@pytest.mark.parametrize("config", [None, "{}", '{"gpt": 1}', "a link to nowhere"])
def test_a_config_that_names_no_model_is_completed_beside_the_weights(model, tmp_path_factory, config):
    kind, file = find_kind(model), model / "config.json"
    (model / CAMPPLUS).touch()
    file.unlink()
    if config and config.startswith("{"):
        file.write_text(config)
    elif config:
        file.symlink_to(model / "nowhere")
    whole = complete(model, kind, tmp_path_factory.mktemp("scratch"))
    assert json.loads((whole / "config.json").read_text())["model_type"] == kind.model_type
    assert find_kind(whole) == kind and not (model / "nowhere").exists()
    assert not file.exists() or file.read_text() == config, "the model's folder is not ours to write to"


@pytest.mark.parametrize("place", CAMPPLUS_PLACES)
def test_a_folder_that_has_campplus_stays_as_it_is(model, place, tmp_path):
    (model / place).parent.mkdir(exist_ok=True)
    (model / place).touch()
    assert complete(model, find_kind(model), tmp_path) == model


def test_campplus_that_the_hub_does_not_give_is_named(model, hub, tmp_path_factory):
    hub.unlink()
    with pytest.raises(LoadError, match=f"TTS_MODEL: {model} lacks {CAMPPLUS}, and the hub did not give it"):
        complete(model, find_kind(model), tmp_path_factory.mktemp("scratch"))
