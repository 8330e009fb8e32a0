"""What SpeechT5 is given and how it learns: spectrograms, losses that add up, attention that stays its own."""

import copy

import numpy as np
import pytest
import torch
from transformers import SpeechT5Config, SpeechT5ForTextToSpeech
from transformers.models.speecht5.modeling_speecht5 import (
    SpeechT5GuidedMultiheadAttentionLoss,
    SpeechT5SpectrogramLoss,
)

from hfspeech.audio import log_mel_spectrogram
from hfspeech.batching import SpeechT5Collator, trimmed
from hfspeech.modeling.speecht5 import make_trainable, off_diagonal, spectrogram_losses
from hfspeech.spelling import TextFrontEnd
from hfspeech.voices import Voices

SIZES = dict(
    hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, speech_decoder_prenet_units=16, speech_decoder_postnet_units=16,
    speech_decoder_postnet_layers=2, max_speech_positions=200, max_text_positions=60, encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
)  # fmt: skip


@pytest.fixture
def processor(nano_speecht5_processor):
    return nano_speecht5_processor


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    return SpeechT5ForTextToSpeech(SpeechT5Config(vocab_size=len(processor.tokenizer), **SIZES))


@pytest.fixture
def collator(processor, model):
    torch.manual_seed(0)
    voices = Voices("speaker", {"slt": torch.nn.functional.normalize(torch.randn(512), dim=0)})
    return SpeechT5Collator(processor, TextFrontEnd(processor.tokenizer), voices, model.config)


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(16000 * seconds)).astype(np.float32)


def row(seconds, text="one two", index=0, **changes):
    found = dict(index=index, row=index + 1, id=str(index), waveform=noise(seconds, index), text=text, speaker="slt")
    return {**found, "duration_s": seconds, **changes}


@pytest.fixture
def batch(collator):
    return collator([row(1.0, "one two three", 0), row(0.7, "four", 1), row(0.52, "nine nine", 2)])


def without_chance(monkeypatch, model):
    """Takes the dropout out that a SpeechT5 keeps even in evaluation: every mask keeps everything."""
    monkeypatch.setattr(torch, "bernoulli", lambda tensor, p=None: torch.ones_like(tensor))
    return model.eval()


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "speaker_embeddings", "labels")}


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.234])
def test_spectrogram_is_the_feature_extractors(processor, seconds):
    waveform = noise(seconds)
    found = log_mel_spectrogram(waveform, processor.feature_extractor)
    if seconds < 0.05:  # stock cannot mirror so short a sound
        assert found.shape == (3, 80) and torch.isfinite(found).all()
        return
    stock = processor.feature_extractor(audio_target=waveform, sampling_rate=16000).input_values[0]
    assert found.shape == stock.shape == (1 + len(waveform) // 256, 80)
    np.testing.assert_allclose(found.numpy(), stock, atol=1e-4)


def test_silence_at_the_ends_is_cut_off_and_counted(collator):
    silent = np.concatenate([np.zeros(8000, np.float32), noise(1.0), np.zeros(16000, np.float32)])
    assert len(trimmed(silent)) / 16000 == pytest.approx(1.1, abs=0.03)
    np.testing.assert_array_equal(trimmed(noise(1.0)), noise(1.0))
    batch = collator([row(2.5, waveform=silent)])
    assert batch["trimmed_s"][0] == pytest.approx(1.4, abs=0.03)
    assert batch["labels"].shape[1] == pytest.approx(1.1 / 0.016, abs=3)


def test_batch_has_what_the_model_takes(collator, batch, processor):
    assert batch["labels"].shape[1] % 2 == 0 and batch["labels"].shape[2] == 80
    lengths = batch["labels"][..., 0].ne(-100).sum(dim=1).tolist()
    assert lengths == [64, 44, 34]  # 63, 44 and 33 frames; the last one is repeated where they are odd
    torch.testing.assert_close(batch["labels"][0, 62], batch["labels"][0, 63])
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["one two three", "four", "nine nine"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [15, 6, 11]  # ▁, the characters, the end
    assert batch["index"] == [0, 1, 2] and batch["speaker_embeddings"].shape == (3, 512)


def test_rows_that_the_model_cannot_take_are_named(collator):
    batch = collator([row(7.0, index=4), row(1.0, "one " * 40, index=5), row(1.0, index=6)])
    assert batch["index"] == [6]
    assert batch["bad_audio"] == [
        "row 5, 4: lasts 7.0 s, longer than the model's 6 s",
        "row 6, 5: its text has 161 tokens, more than the model's 60",
    ]
    nothing = collator([row(1.0, waveform=None, bad_audio="row 1, a.wav: 0 samples")])
    assert nothing["index"] == [] and nothing["labels"].eq(-100).all() and nothing["bad_audio"]


def test_losses_are_transformers_own(monkeypatch, model, collator):
    """Where the rows have as many tokens and frames, the sums over these, divided by their number, are the stock loss."""
    batch = collator([row(1.0, "one two", 0), row(1.0, "six ten", 1)])
    without_chance(monkeypatch, model)
    stock = copy.deepcopy(model)(**inputs_of(batch), return_dict=True).loss
    ours = make_trainable(model)(**inputs_of(batch))
    frames = batch["labels"][..., 0].ne(-100).sum()
    torch.testing.assert_close(ours.loss / frames, stock, rtol=1e-5, atol=1e-5)
    assert set(ours.loss_parts) == {"l1", "stop", "guided"}
    torch.testing.assert_close(sum(part.sum() for part in ours.loss_parts.values()), ours.loss)


def test_each_part_of_the_loss_is_transformers_own(model, batch):
    torch.manual_seed(1)
    labels, config = batch["labels"], model.config
    before, after = torch.randn_like(labels), torch.randn_like(labels)
    logits = torch.randn(labels.shape[:2])
    steps, tokens = labels.shape[1] // 2, batch["attention_mask"].shape[1]
    attentions = [torch.rand(3, 2, steps, tokens) for _ in range(2)]
    parts = spectrogram_losses(config, before, after, logits, labels, attentions, batch["attention_mask"])
    frames = labels[..., 0].ne(-100).sum()
    unguided = copy.deepcopy(config)
    unguided.use_guided_attention_loss = False
    stock = SpeechT5SpectrogramLoss(unguided)(batch["attention_mask"], before, after, logits, labels)
    torch.testing.assert_close((parts["l1"] + parts["stop"]).sum() / frames, stock)
    for number in range(3):  # of the guided part, row by row
        length, count = labels[number, :, 0].ne(-100).sum() // 2, batch["attention_mask"][number].sum()
        heads = torch.cat([a[number : number + 1, :2, :length, :count] for a in attentions], dim=1)
        masks = torch.ones(1, count, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool)
        expected = SpeechT5GuidedMultiheadAttentionLoss(config)(heads, *masks)
        torch.testing.assert_close(parts["guided"][number] / (2 * length), expected)


def test_a_batch_without_a_good_row_teaches_nothing(model, collator):
    nothing = collator([row(1.0, waveform=None, bad_audio="row 1, a.wav: 0 samples")])
    make_trainable(model).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = model(**inputs_of(nothing)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() and not p.grad.any() for p in model.parameters())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], msg=name)


def test_off_diagonal_is_zero_on_the_diagonal_and_behind_the_end():
    found = off_diagonal(torch.tensor([4, 2]), torch.tensor([4, 3]), (4, 4), 0.4)
    torch.testing.assert_close(found[0].diagonal(), torch.zeros(4))
    assert found[0, 0, 3] > found[0, 0, 2] > found[0, 0, 1] > 0
    assert not found[1, 2:].any() and not found[1, :, 3].any()


def test_gradients_do_not_depend_on_how_rows_are_batched(monkeypatch, model, collator):
    """The sum over two batches is that of one batch of both; the postnet's normalisation is frozen, as under LoRA."""
    rows = [row(1.0, "one two three", 0), row(0.7, "four", 1), row(0.52, "nine nine", 2)]
    model.speech_decoder_postnet.requires_grad_(False)
    make_trainable(without_chance(monkeypatch, model)).train()
    without_dropout(model)

    def gradient(*batches):
        model.zero_grad()
        for part in batches:
            model(**inputs_of(collator(part))).loss.backward()
        return model.speecht5.decoder.prenet.final_layer.weight.grad.clone()

    together = gradient(rows)
    assert together.abs().max() > 0
    torch.testing.assert_close(gradient(rows[:1], rows[1:]), together, rtol=1e-3, atol=1e-4)


def test_fused_attention_is_transformers_own(monkeypatch, model, batch):
    """In training, but for dropout: the same loss and the same gradient of every weight."""
    monkeypatch.setattr(torch, "bernoulli", lambda tensor, p=None: torch.ones_like(tensor))
    without_dropout(model)
    stock, ours = copy.deepcopy(model).train(), make_trainable(model).train()
    one = {name: value[:1] for name, value in inputs_of(batch).items()}
    frames = one["labels"][..., 0].ne(-100).sum()
    stock(**one, return_dict=True).loss.backward()
    (ours(**one).loss / frames).backward()
    for (name, theirs), mine in zip(stock.named_parameters(), ours.parameters()):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any(), name
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_saved_is_stock(model, batch, tmp_path, monkeypatch):
    make_trainable(model).save_pretrained(tmp_path)
    again = SpeechT5ForTextToSpeech.from_pretrained(tmp_path)
    assert type(again) is SpeechT5ForTextToSpeech and again.config.architectures == ["SpeechT5ForTextToSpeech"]
    for (name, mine), theirs in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=name)
    # Without labels nothing is changed.
    without_chance(monkeypatch, model)
    again.eval()
    asked = {name: batch[name] for name in ("input_ids", "attention_mask", "speaker_embeddings")}
    one = {name: value[:1] for name, value in asked.items()}
    mine, theirs = (m.generate_speech(**one, maxlenratio=3.0) for m in (model, again))
    torch.testing.assert_close(mine, theirs)
