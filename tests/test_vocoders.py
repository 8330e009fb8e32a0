"""Vocoders: the sound has the spectrogram it was made from, and each row is what it would be alone."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import NEW_DIGITS
from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

from hfspeech.errors import UserError
from hfspeech.models.vocoders import load_vocoder

RECORDINGS = sorted((NEW_DIGITS / "test").glob("*.ogg"))[:2]


def log_mel(waveform):
    features = SpeechT5FeatureExtractor()(audio_target=waveform, sampling_rate=16000)
    return torch.as_tensor(np.asarray(features["input_values"][0]))


def distance(a, b):
    """Mean difference of two spectrograms, in log10, over the frames that both have."""
    frames = min(len(a), len(b))
    return (a[:frames] - b[:frames]).abs().mean().item()


def test_griffin_lim_gives_the_recording_back():
    waveforms = [soundfile.read(path, dtype="float32")[0] for path in RECORDINGS]
    vocoder = load_vocoder("griffin_lim")
    spectrograms = [log_mel(waveform) for waveform in waveforms]
    state = torch.get_rng_state()
    found = vocoder(spectrograms)
    assert torch.equal(torch.get_rng_state(), state)
    assert (vocoder.name, vocoder.sampling_rate) == ("griffin_lim", 16000)
    for waveform, spectrogram, sound in zip(waveforms, spectrograms, found, strict=True):
        assert sound.dtype == np.float32 and abs(sound).max() <= 1
        assert len(sound) == 256 * len(spectrogram) and abs(len(sound) - len(waveform)) <= 256
        # Frames that are off by one differ by 0.13 or more, by half a hop by 0.08.
        assert distance(log_mel(sound), spectrogram) < 0.05
        assert distance(log_mel(sound[128:]), spectrogram) > 0.07
        assert distance(log_mel(sound), spectrogram[1:]) > 0.1
    for one, again in zip(found, vocoder(spectrograms)):
        assert np.array_equal(one, again)


def test_griffin_lim_of_a_few_frames():
    found = load_vocoder("griffin_lim")([torch.full((frames, 80), -3.0, dtype=torch.bfloat16) for frames in (1, 2, 4)])
    assert [len(sound) for sound in found] == [256, 512, 1024]
    assert all(np.isfinite(sound).all() for sound in found)


@pytest.fixture(scope="module")
def hifigan(tmp_path_factory):
    """A tiny vocoder of random weights: (folder, the model)."""
    torch.manual_seed(0)
    sizes = {"upsample_initial_channel": 32, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights make no sound
            parameter.normal_(std=0.15)
    model.mean.fill_(-2.0)
    folder = tmp_path_factory.mktemp("vocoder") / "hifigan"
    model.save_pretrained(folder)
    return folder, model


def test_hifigan_is_the_stock_model_row_by_row(hifigan):
    folder, model = hifigan
    spectrograms = [torch.randn(frames, 80) - 2 for frames in (30, 12, 21)]
    published = json.loads((folder / "config.json").read_text()) | {"model_type": "hifigan"}
    (folder / "config.json").write_text(json.dumps(published))  # as microsoft/speecht5_hifigan has it
    vocoder = load_vocoder(str(folder))
    assert vocoder.sampling_rate == 16000
    with torch.no_grad():
        expected = [model(spectrogram).numpy() for spectrogram in spectrograms]
    assert max(abs(waveform).max() for waveform in expected) > 0.01
    vocoder.rows_at_once = 1
    for sound, waveform in zip(vocoder(spectrograms), expected, strict=True):
        assert sound.dtype == np.float32 and np.allclose(sound, waveform, atol=1e-5)
    vocoder.rows_at_once = 3
    unseen = 8 * 256  # frames at the end that its convolutions see past
    for sound, waveform in zip(vocoder(spectrograms), expected, strict=True):
        assert len(sound) == len(waveform)
        assert np.allclose(sound[:-unseen], waveform[:-unseen], atol=1e-5)


def test_hifigan_in_bf16_sounds_the_same(hifigan):
    folder, _ = hifigan
    waveform = soundfile.read(RECORDINGS[0], dtype="float32")[0]
    vocoder = load_vocoder(str(folder))
    found = {}
    for vocoder.in_bf16 in (False, True):
        [found[vocoder.in_bf16]] = vocoder([log_mel(waveform)])
    exact, rounded = found[False], found[True]
    assert rounded.dtype == np.float32 and not np.array_equal(exact, rounded)
    assert np.square(exact - rounded).sum() < 1e-3 * np.square(exact).sum()  # 30 dB below it
    assert distance(log_mel(exact), log_mel(rounded)) < 0.02


def test_bad_vocoders(hifigan, tmp_path):
    folder, model = hifigan
    with pytest.raises(UserError, match="There is no vocoder grifin_lim. Did you mean griffin_lim?"):
        load_vocoder("grifin_lim")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no config.json"):
        load_vocoder(tmp_path / "empty")
    config = json.loads((folder / "config.json").read_text())
    for name, changes, message in (
        ("hop", {"upsample_rates": [4, 4, 4, 2]}, "128 samples a frame; SpeechT5 needs"),
        ("kind", {"model_type": "whisper"}, "is a whisper model, not a vocoder"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_vocoder(tmp_path / name)
    model.save_pretrained(tmp_path / "half", state_dict=dict(list(model.state_dict().items())[:4]))
    with pytest.raises(UserError, match="is missing"):
        load_vocoder(tmp_path / "half")
