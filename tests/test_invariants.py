"""Settings that must agree do agree."""

import numpy as np
import pytest
import torch
from conftest import DIGITS, NANO, one_pass
from peft import PeftModel
from transformers import WhisperForConditionalGeneration, WhisperProcessor, set_seed

from hfspeech.arguments import DataArguments, LoraArguments, WhisperArguments, WhisperTrainingArguments
from hfspeech.audio import decode
from hfspeech.batching import WhisperCollator
from hfspeech.data import load_speech
from hfspeech.metrics import TranscriptScore
from hfspeech.modeling import whisper as modeling
from hfspeech.models.lora import add_lora
from hfspeech.models.whisper import load_for_inference, load_whisper
from hfspeech.training.whisper import WhisperTrainer


def train(data, output_dir, steps=3, lora=False, **changes):
    """Trains the nano Whisper in this process and returns the trainer; nothing random but the order of the rows."""
    settings = {"max_steps": steps, "logging_steps": 1, "learning_rate": 1e-3, "report_to": ["none"]}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    settings |= {"eval_on_start": False, "dataloader_num_workers": 0, "normalizer": "basic", **changes}
    args = WhisperTrainingArguments(output_dir=str(output_dir), **settings)
    args.run_arguments = {}
    set_seed(args.seed)
    model, processor = load_whisper(WhisperArguments(model_name_or_path=str(NANO), language="english", dropout=0.0))
    if lora:
        model = add_lora(model, LoraArguments(lora_r=4, lora_dropout=0.0))
    speech = load_speech(DataArguments(dataset_name=[str(data)]), processor, args.seed)
    trainer = WhisperTrainer(
        model, args, speech["train"], speech["validation"], WhisperCollator(processor),
        TranscriptScore(processor, None, args.normalizer), processor,
    )  # fmt: skip
    trainer.speech = speech
    if steps:
        trainer.train_or_resume()
    return trainer


def curve(log):
    """Returns loss and gradient norm of each step."""
    return np.array([(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry])


@pytest.fixture(scope="module")
def one_batch_of_eight(few_digits, tmp_path_factory):
    trainer = train(few_digits, tmp_path_factory.mktemp("run"), per_device_train_batch_size=8)
    return curve(trainer.state.log_history)


@pytest.mark.parametrize("batch, accumulation", [(4, 2), (1, 8)])
def test_accumulation_changes_nothing(few_digits, tmp_path, one_batch_of_eight, batch, accumulation):
    trainer = train(few_digits, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert len(one_batch_of_eight) == 3
    np.testing.assert_allclose(curve(trainer.state.log_history), one_batch_of_eight, rtol=2e-3)


def test_loss_is_the_mean_over_tokens(few_digits, tmp_path):
    """Against transformers' own model on the same batch at the full window, whose loss is that mean."""
    trainer = train(few_digits, tmp_path, steps=0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    ours = trainer.compute_loss(trainer.model.eval(), batch)
    stock = WhisperForConditionalGeneration.from_pretrained(NANO).eval()
    torch.testing.assert_close(ours, stock(input_features=batch["input_features"], labels=batch["labels"]).loss)


@pytest.mark.parametrize("is_broken", [False, True])
def test_batch_size_does_not_change_an_evaluation(few_digits, tmp_path, monkeypatch, is_broken):
    """Nor that of a model that never ends a text, whose rows are cut off at what their own length allows."""
    monkeypatch.setattr(modeling, "BOUND_TOKENS_PER_SECOND", 5)  # so that the bound is nowhere what the nano can write
    found = []
    for batch in (1, 8):
        trainer = train(few_digits, tmp_path / str(batch), steps=0, per_device_eval_batch_size=batch)
        if is_broken:
            trainer.model.proj_out.bias = torch.nn.Parameter(torch.zeros(trainer.model.config.vocab_size))
            trainer.model.proj_out.bias.data[trainer.model.config.eos_token_id] = -1e9
        trainer.evaluate(trainer.speech["test"])
        score, rows = trainer.last_evaluation
        assert score["unfinished"] == (8 if is_broken else 0)
        found.append((score["loss"], [row["prediction"] for row in rows]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


def test_ours_equals_stock_inference(few_digits, tmp_path):
    """The transcripts of an evaluation are those of `generate` on stock features, one recording at a time."""
    trainer = train(few_digits, tmp_path, steps=0)
    trainer.evaluate(trainer.speech["test"])
    ours = [row["prediction"] for row in trainer.last_evaluation[1]]
    model = WhisperForConditionalGeneration.from_pretrained(NANO).eval()
    processor = WhisperProcessor.from_pretrained(NANO)
    stock = []
    for i in range(len(trainer.speech["test"])):
        waveform = trainer.speech["test"][i]["waveform"]
        features = processor(waveform, sampling_rate=16000, return_tensors="pt").input_features
        tokens = model.generate(features, language="en", task="transcribe")
        stock.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert ours == stock
    assert any(ours)


def test_merged_equals_adapter(few_digits, tmp_path):
    trainer = train(few_digits, tmp_path, steps=3, lora=True, per_device_train_batch_size=8, learning_rate=1e-2)
    trainer.save_model(tmp_path)
    base = WhisperForConditionalGeneration.from_pretrained(NANO)
    adapter = PeftModel.from_pretrained(base, tmp_path).eval()
    merged, processor = load_for_inference(str(tmp_path))
    audio = sorted((DIGITS / "test").glob("*.ogg"))[0]
    features = processor(decode(audio), sampling_rate=16000, return_tensors="pt").input_features
    start = torch.tensor([[merged.config.decoder_start_token_id]])
    with torch.no_grad():
        of_adapter = adapter(input_features=features, decoder_input_ids=start).logits
        of_merged = merged.cpu()(input_features=features, decoder_input_ids=start).logits
        of_base = WhisperForConditionalGeneration.from_pretrained(NANO)(
            input_features=features, decoder_input_ids=start
        ).logits
    torch.testing.assert_close(of_adapter, of_merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(of_adapter, of_base, atol=1e-2)


def test_streamed_equals_loaded(few_digits):
    processor = WhisperProcessor.from_pretrained(NANO)
    loaded = load_speech(DataArguments(dataset_name=[str(few_digits)]), processor)
    streamed = load_speech(DataArguments(dataset_name=[str(few_digits)], streaming=True), processor)
    by_id = {row["id"]: row for row in one_pass(streamed["train"])}
    assert len(by_id) == len(loaded["train"]) == 24
    for i in range(len(loaded["train"])):
        row = loaded["train"][i]
        np.testing.assert_array_equal(np.asarray(by_id[row["id"]]["waveform"], np.float32), row["waveform"])
        assert by_id[row["id"]]["text"] == row["text"]
