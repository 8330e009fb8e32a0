"""Speed perturbation: what it promises about pitch and duration, and where it must not reach."""

import numpy as np
import pytest
from conftest import DIGITS, NANO, one_pass
from transformers import WhisperProcessor

from hfspeech.arguments import DataArguments
from hfspeech.augment import SpeedPerturbation, augment
from hfspeech.data import load_speech


@pytest.fixture(scope="module")
def nano():
    processor = WhisperProcessor.from_pretrained(NANO)
    processor.tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    return processor


def sine(frequency_hz=440.0, duration_s=2.0, **more):
    waveform = np.sin(2 * np.pi * frequency_hz * np.arange(int(16000 * duration_s)) / 16000).astype(np.float32)
    return {"waveform": waveform, "duration_s": duration_s, "index": 0, "epoch": 0, "row": 1, "text": "tone", **more}


def frequency(waveform):
    middle = waveform[len(waveform) // 8 : -len(waveform) // 8]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 18))
    return spectrum.argmax() * 16000 / (1 << 18)


@pytest.mark.parametrize("speed", [0.8, 0.9, 1.1, 1.25])
def test_pitch_and_duration_move_together(speed):
    row = sine()
    changed = SpeedPerturbation([speed], 0, 30)(row)
    assert frequency(changed["waveform"]) == pytest.approx(440 * speed, rel=0.004)
    assert changed["duration_s"] == pytest.approx(2 / speed, rel=0.004)
    assert changed["duration_s"] == len(changed["waveform"]) / 16000
    assert changed["waveform"].dtype == np.float32
    assert np.abs(changed["waveform"][2000:-2000]).max() == pytest.approx(1, abs=0.02)  # as loud as before
    assert {k: v for k, v in changed.items() if k not in ("waveform", "duration_s")} == {
        k: v for k, v in row.items() if k not in ("waveform", "duration_s")
    }


def test_speed_one_changes_nothing():
    row = sine()
    assert SpeedPerturbation([1.0], 0, 30)(row)["waveform"] is row["waveform"]


def test_the_speed_depends_on_seed_epoch_and_row_only():
    def durations(seed, epoch):
        perturbation = SpeedPerturbation([0.9, 1.0, 1.1], seed, 30)
        return [perturbation(sine(duration_s=0.5, index=i, epoch=epoch))["duration_s"] for i in range(30)]

    assert durations(1, 0) == durations(1, 0)
    assert durations(1, 0) != durations(2, 0) and durations(1, 0) != durations(1, 1)
    assert len(set(durations(1, 0))) == 3


def test_a_row_that_would_outgrow_the_window_keeps_its_speed():
    perturbation = SpeedPerturbation([0.9], 0, 5)
    assert perturbation(sine(duration_s=4.4))["duration_s"] > 4.8
    assert perturbation(sine(duration_s=4.8))["duration_s"] == 4.8


def test_an_unreadable_row_passes_through():
    row = {**sine(), "waveform": None, "bad_audio": "row 1: 0 samples"}
    assert SpeedPerturbation([0.9], 0, 30)(row) == row


def test_only_training_rows_change_and_a_second_look_is_the_same(few_digits, nano):
    speech = load_speech(DataArguments(dataset_name=[str(few_digits)]), nano)
    before = {split: [row["duration_s"] for row in rows] for split, rows in speech.items()}
    speech["train"] = augment(speech["train"], [0.9, 1.1], nano, seed=5)
    after = {split: [row["duration_s"] for row in rows] for split, rows in speech.items()}
    assert after["validation"] == before["validation"] and after["test"] == before["test"]
    assert all(a != b for a, b in zip(after["train"], before["train"]) if b < 4)
    assert [row["duration_s"] for row in speech["train"]] == after["train"]
    speech["train"].set_epoch(1)
    assert [row["duration_s"] for row in speech["train"]] != after["train"]


def test_no_speeds_no_change(few_digits, nano):
    speech = load_speech(DataArguments(dataset_name=[str(few_digits)]), nano)
    assert augment(speech["train"], None, nano) is speech["train"] and not speech["train"].transforms


def test_a_stream_changes_as_it_comes(few_digits, nano):
    arguments = DataArguments(dataset_name=[str(few_digits)], streaming=True)
    plain = {
        row["text"] + str(row["row"]): row["duration_s"] for row in one_pass(load_speech(arguments, nano)["train"])
    }
    rows = one_pass(augment(load_speech(arguments, nano)["train"], [1.25], nano))
    assert len(rows) == len(plain) == 24
    for row in rows:
        assert row["duration_s"] == pytest.approx(plain[row["text"] + str(row["row"])] / 1.25, rel=0.01)
        assert len(row["waveform"]) == pytest.approx(16000 * row["duration_s"], abs=1)


def test_the_shipped_rows_stay_as_they_are_on_disk(nano):
    rows = load_speech(DataArguments(dataset_name=[str(DIGITS)], max_train_samples=2, max_eval_samples=2,
                                     max_test_samples=2), nano)  # fmt: skip
    first = rows["train"][0]["waveform"]
    changed = augment(rows["train"], [0.9], nano)[0]["waveform"]
    assert len(changed) > len(first)
