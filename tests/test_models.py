"""Whisper and its adapters: the right settings in the right place, and saved files that stock tools agree with."""

import json
import shutil

import pytest
import torch
from conftest import DIGITS, NANO
from peft import PeftModel
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from hfspeech.arguments import LoraArguments, WhisperArguments
from hfspeech.audio import decode
from hfspeech.errors import UserError
from hfspeech.models.loading import base_of, resolve
from hfspeech.models.lora import add_lora
from hfspeech.models.whisper import language_code, load_for_inference, load_whisper


def load(folder=NANO, language="english", **settings):
    return load_whisper(WhisperArguments(model_name_or_path=str(folder), language=language, **settings))


def prefix(processor):
    return processor.tokenizer.convert_ids_to_tokens(processor.tokenizer.prefix_tokens)


@pytest.fixture(scope="session")
def english_only(tmp_path_factory):
    """The nano Whisper as an English-only one: no language and task tokens in use."""
    folder = tmp_path_factory.mktemp("models") / "nano.en"
    shutil.copytree(NANO, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    for name in ("lang_to_id", "task_to_id", "language", "task"):
        del generation[name]
    (folder / "generation_config.json").write_text(json.dumps({**generation, "is_multilingual": False}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "language": None, "task": None}))
    return folder


@pytest.fixture(scope="session")
def features():
    """Log-mel features of three shipped recordings."""
    extractor = WhisperProcessor.from_pretrained(NANO).feature_extractor
    recordings = [decode(str(path)) for path in sorted((DIGITS / "test").glob("*.ogg"))[:3]]
    return extractor(recordings, sampling_rate=16000, return_tensors="pt").input_features


def logits(model, features):
    tokens = torch.tensor([[296, 297, 299, 303, 5, 6]] * len(features))
    with torch.no_grad():
        return model.eval()(input_features=features, decoder_input_ids=tokens).logits


# Language, task, timestamps


def test_language_task_and_timestamps_go_into_generation_config_and_prefix_only():
    model, processor = load(task="translate", timestamps=True)
    generation = model.generation_config
    assert (generation.language, generation.task, generation.return_timestamps) == ("en", "translate", True)
    assert prefix(processor) == ["<|startoftranscript|>", "<|en|>", "<|translate|>"]
    untouched = WhisperConfig.from_pretrained(NANO)
    for name in ("forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens", "decoder_start_token_id"):
        assert getattr(model.config, name, None) == getattr(untouched, name, None)
    assert not {"language", "task", "return_timestamps"} & model.config.to_diff_dict().keys()
    assert generation.forced_decoder_ids is None


def test_without_timestamps_the_prefix_says_so():
    model, processor = load(language="EN")
    assert model.generation_config.return_timestamps is False
    assert prefix(processor) == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


def test_saved_settings_decode_without_being_told(tmp_path, features):
    model, processor = load(task="translate")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config.task == "translate" and again.generation_config.language == "en"
    assert prefix(WhisperProcessor.from_pretrained(tmp_path)) == prefix(processor)
    torch.testing.assert_close(logits(again, features), logits(model, features), rtol=0, atol=0)


@pytest.mark.parametrize("name, code", [("German", "de"), ("de", "de"), ("castilian", "es"), ("YUE", "yue")])
def test_languages_by_name_and_code(name, code):
    assert language_code(name) == code


def test_an_unknown_language_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="--language germn.* Did you mean german?"):
        language_code("germn")


def test_a_multilingual_model_needs_a_language():
    with pytest.raises(UserError, match="--language"):
        load(language=None)


def test_an_english_only_model_needs_none_and_takes_no_other(english_only, features):
    model, processor = load(english_only, language=None)
    assert prefix(processor) == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert not {"language", "task"} & model.generation_config.to_diff_dict().keys()
    assert len(model.generate(features, max_new_tokens=3)) == len(features)  # stock generate refuses language and task
    assert prefix(load(english_only, language="english")[1]) == prefix(processor)
    with pytest.raises(UserError, match="English only"):
        load(english_only, language="german")
    with pytest.raises(UserError, match="English only"):
        load(english_only, language=None, task="translate")


def test_an_english_only_model_is_loaded_for_inference_too(english_only, features):
    model, processor = load_for_inference(english_only)
    assert len(model.generate(features, max_new_tokens=3)) == len(features)
    load_for_inference(english_only, language="english")
    load_for_inference(english_only, task="transcribe")
    with pytest.raises(UserError, match="English only"):
        load_for_inference(english_only, language="german")


# What is trained


def test_a_frozen_encoder_stays_frozen():
    model, _ = load(freeze_encoder=True)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}


def test_dropout_and_spec_augment_reach_the_model():
    model, _ = load(dropout=0.25, apply_spec_augment=True, mask_time_prob=0.125)
    assert model.model.decoder.layers[0].dropout == 0.25
    assert model.config.apply_spec_augment is True and model.config.mask_time_prob == 0.125
    assert load()[0].config.dropout == WhisperConfig.from_pretrained(NANO).dropout


def test_only_the_adapter_is_trained():
    model = add_lora(load()[0], LoraArguments(lora_r=2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert any(".encoder." in name for name in trained) and any(".decoder." in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
    }  # fmt: skip


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_a_frozen_encoder_gets_no_adapter(targets):
    model = add_lora(load(freeze_encoder=True)[0], LoraArguments(lora_r=2, lora_target_modules=targets))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".encoder." in name for name in trained if ".encoder_attn." not in name)


def test_the_convolutions_are_refused():
    model, _ = load_whisper(WhisperArguments(model_name_or_path=str(NANO), language="english"))
    with pytest.raises(UserError, match="conv1 and conv2 cannot be adapted"):
        add_lora(model, LoraArguments(lora_target_modules=["q_proj", "conv1"]))


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match="--lora_target_modules query .*q_proj"):
        add_lora(load()[0], LoraArguments(lora_target_modules=["query"]))


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_learns(use_dora, features):
    model = add_lora(load()[0], LoraArguments(lora_r=2, lora_dropout=0, use_dora=use_dora))
    assert any("magnitude" in name for name, _ in model.named_parameters()) == use_dora
    labels = torch.tensor([[297, 299, 303, 9, 295]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(3):
        loss = model(input_features=features[:1], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# Saved and loaded again


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A saved adapter whose update is not zero, with what a run saves beside it."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(0)
    model, processor = load(task="translate")
    model = add_lora(model, LoraArguments(lora_r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    base_of(model).generation_config.save_pretrained(folder)
    return folder


def test_an_adapter_knows_its_base_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(NANO.parent)
    model = add_lora(load("nano_whisper")[0], LoraArguments(lora_r=2))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(NANO)
    monkeypatch.chdir(tmp_path)
    load_for_inference(tmp_path / "adapter")


def test_a_base_model_is_loaded_as_stock_does(features):
    model, _ = load_for_inference(NANO)
    stock = WhisperForConditionalGeneration.from_pretrained(NANO)
    torch.testing.assert_close(logits(model.cpu(), features), logits(stock, features), rtol=0, atol=0)
    assert not model.training


def test_an_adapter_is_loaded_as_stock_does(adapter, features):
    model, processor = load_for_inference(adapter)
    base = WhisperForConditionalGeneration.from_pretrained(NANO)
    before = logits(base, features)
    stock = PeftModel.from_pretrained(base, adapter)
    expected = logits(stock, features)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model.cpu(), features), expected, rtol=1e-4, atol=1e-4)
    assert model.generation_config.task == "translate"
    assert prefix(processor)[2] == "<|translate|>"


def test_an_adapter_without_processor_and_generation_config_takes_its_base_s(adapter, tmp_path, features):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path)
    model, processor = load_for_inference(tmp_path)
    assert model.generation_config.task == "transcribe"
    assert prefix(processor)[1] == "<|en|>"
    assert logits(model.cpu(), features).shape[-1] == model.config.vocab_size


def test_language_and_task_can_be_set_for_inference(adapter):
    model, processor = load_for_inference(adapter, task="transcribe")
    assert model.generation_config.task == "transcribe" and model.generation_config.language == "en"


def test_timestamps_stay_as_they_were_trained(tmp_path):
    model, processor = load(timestamps=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_for_inference(tmp_path, language="english")
    assert model.generation_config.return_timestamps is True
    assert "<|notimestamps|>" not in prefix(processor)


def test_an_adapter_whose_base_is_gone(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    gone = {**config, "base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(UserError, match="gone"):
        load_for_inference(tmp_path / "a")


def test_from_random_weights(tmp_path):
    arguments = WhisperArguments(config_name=str(NANO), language="english")
    torch.manual_seed(0)
    model, _ = load_whisper(arguments)
    trained = WhisperForConditionalGeneration.from_pretrained(NANO)
    assert not torch.allclose(model.model.decoder.embed_tokens.weight, trained.model.decoder.embed_tokens.weight)
    assert model.generation_config.lang_to_id == {"<|en|>": 297} and model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]


def test_resolve():
    assert resolve(f"{NANO}/../nano_whisper") == str(NANO)
    assert resolve("openai/whisper-small") == "openai/whisper-small"
    for wrong in ("/nowhere/at/all", "./here/not", "whisper-small", "a/b/c"):
        with pytest.raises(UserError, match=wrong):
            resolve(wrong)
