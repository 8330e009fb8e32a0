"""Speaker embeddings: alike for one voice, apart for two, computed once, and never silently of the wrong size."""

import csv
import types

import numpy as np
import pytest
import torch
from conftest import NEW_DIGITS
from safetensors.torch import save_file
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from hfspeech.arguments import DataArguments
from hfspeech.audio import decode
from hfspeech.data import load_speech
from hfspeech.errors import UserError
from hfspeech.spelling import TextFrontEnd
from hfspeech.voices import MelStatistics, XVectorEncoder, find_voices, load_speaker_encoder, voice_of


@pytest.fixture(scope="module")
def recordings():
    """Speaker → ten recordings of it."""
    found = {}
    with (NEW_DIGITS / "test/metadata.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            mine = found.setdefault(row["speaker"], [])
            if len(mine) < 10:
                mine.append(decode(NEW_DIGITS / "test" / row["file_name"]))
    return found


@pytest.fixture
def wavlm(tmp_path, monkeypatch):
    """The folder of a tiny WavLMForXVector with random weights, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 8),
        conv_stride=(8, 8), num_feat_extract_layers=2, tdnn_dim=(16, 16), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, xvector_output_dim=512,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(tmp_path / "wavlm")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wavlm")
    return tmp_path / "wavlm"


def test_mel_statistics_tell_voices_apart_and_not_loudness(recordings):
    encoder = MelStatistics()
    of_speaker = {name: encoder(waveforms) for name, waveforms in recordings.items()}
    assert len(of_speaker) == 4
    for embeddings in of_speaker.values():
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
    means = {name: torch.nn.functional.normalize(found.mean(dim=0), dim=0) for name, found in of_speaker.items()}
    hits = [
        max(means, key=lambda name: float(one @ means[name])) == speaker
        for speaker, found in of_speaker.items()
        for one in found
    ]
    assert np.mean(hits) > 0.9
    quiet = encoder([0.1 * waveform for waveform in recordings["slt"]])
    torch.testing.assert_close(quiet, of_speaker["slt"], atol=1e-3, rtol=0)


def test_xvectors_are_those_of_the_model_and_are_computed_once(wavlm, recordings, monkeypatch):
    encoder = load_speaker_encoder(str(wavlm))
    assert isinstance(encoder, XVectorEncoder)
    waveforms = recordings["slt"][:2]
    found = encoder(waveforms)
    stock, extractor = WavLMForXVector.from_pretrained(wavlm).eval(), Wav2Vec2FeatureExtractor.from_pretrained(wavlm)
    with torch.no_grad():
        inputs = extractor(waveforms[0], sampling_rate=16000, return_tensors="pt")
        expected = torch.nn.functional.normalize(stock(**inputs).embeddings[0], dim=0)
    torch.testing.assert_close(found[0], expected)

    def fails(*_, **__):
        raise AssertionError("computed twice")

    assert torch.isfinite(encoder([waveforms[0][:1600]])).all()  # a tenth of a second is too little for its layers

    again = load_speaker_encoder(str(wavlm))
    monkeypatch.setattr(again.model, "forward", fails)
    torch.testing.assert_close(again(waveforms), found)
    with pytest.raises(AssertionError):  # what it has not heard, it has to compute
        again([recordings["slt"][2]])


def test_speechbrain_is_asked_for_in_one_sentence():
    with pytest.raises(UserError, match="pip install speechbrain"):
        load_speaker_encoder("speechbrain/spkrec-xvect-voxceleb")


def test_a_voice_needs_a_second_of_speech(recordings):
    encoder = MelStatistics()
    with pytest.raises(UserError, match="me.wav lasts 0.2 s, too short to tell a voice: give at least 1 s"):
        voice_of(recordings["slt"][0][:3200], encoder, "me.wav")
    torch.testing.assert_close(voice_of(recordings["slt"][0], encoder), encoder([recordings["slt"][0]])[0])


class TestFindVoices:
    """On a few rows of three speakers."""

    def speech(self, few_digits, processor, **changes):
        data_args = DataArguments(dataset_name=[str(few_digits)], **changes)
        return load_speech(data_args, processor, 42, 60, TextFrontEnd(processor.tokenizer))

    def find(self, speech, per="speaker", file=None):
        settings = types.SimpleNamespace(speaker_embedding_per=per, speaker_embeddings_file=file)
        return find_voices(speech, settings, MelStatistics())

    def test_one_for_each_speaker(self, few_digits, nano_speecht5_processor):
        speech = self.speech(few_digits, nano_speecht5_processor)
        voices = self.find(speech)
        assert set(voices.speakers) == set(speech["train"].column("speaker"))
        everyone = {name for rows in speech.values() for name in rows.column("speaker")}
        assert {name for _, name in voices.embeddings} == everyone
        row = speech["train"].record(0)
        torch.testing.assert_close(voices.of(row), voices.speakers[row["speaker"]])
        stranger = {**row, "dataset": "another"}  # the same name elsewhere is somebody else
        with pytest.raises(KeyError):
            voices.of(stranger)

    def test_one_for_each_utterance(self, few_digits, nano_speecht5_processor):
        speech = self.speech(few_digits, nano_speecht5_processor)
        voices = self.find(speech, "utterance")
        row = speech["test"][1]
        torch.testing.assert_close(voices.of(row), MelStatistics()([row["waveform"]])[0])
        assert voices.speakers == {}

    def test_one_for_all(self, few_digits, nano_speecht5_processor):
        speech = self.speech(few_digits, nano_speecht5_processor)
        voices = self.find(speech, "dataset")
        torch.testing.assert_close(voices.of(speech["test"].record(0)), voices.of(speech["train"].record(5)))
        assert list(voices.speakers) == ["voice"]

    def test_without_a_speaker_column_it_says_what_to_type(self, few_digits, nano_speecht5_processor, tmp_path):
        for split in ("train", "validation", "test"):
            folder = tmp_path / "digits" / split
            folder.mkdir(parents=True)
            rows = list(csv.DictReader((few_digits / split / "metadata.csv").open(newline="")))
            with (folder / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["file_name", "text"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            for row in rows:
                (folder / row["file_name"]).write_bytes((few_digits / split / row["file_name"]).read_bytes())
        speech = self.speech(tmp_path / "digits", nano_speecht5_processor)
        with pytest.raises(UserError, match="--speaker_embedding_per dataset"):
            self.find(speech)
        assert self.find(speech, "dataset").speakers

    def test_from_files(self, few_digits, nano_speecht5_processor, tmp_path):
        speech = self.speech(few_digits, nano_speecht5_processor)
        vectors = {name: torch.randn(512) for rows in speech.values() for name in rows.column("speaker")}
        save_file(vectors, tmp_path / "voices.safetensors")
        voices = self.find(speech, file=str(tmp_path / "voices.safetensors"))
        row = speech["test"].record(0)
        torch.testing.assert_close(voices.of(row), torch.nn.functional.normalize(vectors[row["speaker"]], dim=0))
        np.save(tmp_path / "one.npy", np.ones(512, np.float32))
        assert self.find(speech, file=str(tmp_path / "one.npy")).of(row)[0] == pytest.approx(512**-0.5)

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda p: np.save(p / "f.npy", np.ones(256, np.float32)), "256 numbers, and SpeechT5 takes 512"),
            (lambda p: save_file({"nobody": torch.ones(512)}, p / "f.safetensors"), "has no embedding for"),
            (lambda p: (p / "f.safetensors").write_bytes(b"broken"), "is damaged"),
            (lambda p: (p / "f.txt").write_text("1 2 3"), "a .safetensors or an .npy file"),
            (lambda p: (p / "f.npy").write_bytes(b"broken"), "is damaged"),
            (lambda p: np.save(p / "f.npy", np.zeros(512, np.float32)), "zero or not finite"),
            (lambda p: None, "There is no file"),
        ],
    )
    def test_bad_files_end_in_one_sentence(self, make, message, few_digits, nano_speecht5_processor, tmp_path):
        make(tmp_path)
        path = next(tmp_path.glob("f.*"), tmp_path / "missing.npy")
        speech = self.speech(few_digits, nano_speecht5_processor)
        with pytest.raises(UserError, match=message):
            self.find(speech, file=str(path))
