"""Measures of synthesised speech against sounds whose pitch, spectrum and warping are known, and on real recordings."""

import csv
import json

import numpy as np
import pytest
import torch
import torchaudio
from conftest import ROOT
from transformers import SpeechT5FeatureExtractor
from transformers.audio_utils import hertz_to_mel

from hfspeech.audio import decode
from hfspeech.errors import UserError
from hfspeech.metrics import (
    SynthesisScore,
    align,
    log_f0,
    log_f0_rmse,
    mel_cepstra,
    mel_cepstral_distortion,
    repeated_and_skipped,
    score,
    stop_health,
)
from hfspeech.metrics.transcripts import ratios

FOLDER = ROOT / "assets/flite_digits/test"
RATE = 16000
SEMITONE = np.log(2) / 12


def recording(number):
    return decode(FOLDER / f"{number:05d}.ogg")


def voiced_sound(f0_hz, seconds=1.0):
    """A sound with ten harmonics; `f0_hz` is a number, or an array of one frequency for each sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(f0_hz, round(seconds * RATE)) / RATE)
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 11))).astype(np.float32)


def stretched(waveform, rate):
    """The same speech, `rate` times as fast, at the same pitch."""
    window = torch.hann_window(1024)
    spectrum = torch.stft(torch.from_numpy(waveform), 1024, 256, window=window, return_complex=True)
    advance = torch.linspace(0, np.pi * 256, 513)[:, None]
    spectrum = torchaudio.functional.phase_vocoder(spectrum, rate, advance)
    return torch.istft(spectrum, 1024, 256, window=window).numpy()


# mel cepstra and their distance


def test_cepstra_are_the_cosine_series_of_the_spectrogram_that_speecht5_learns():
    glide = voiced_sound(np.linspace(100, 200, RATE))  # sound from end to end: nothing is trimmed
    log10_mel = SpeechT5FeatureExtractor()(audio_target=glide, sampling_rate=RATE)["input_values"][0]
    cepstra = mel_cepstra(glide)
    assert cepstra.shape == (len(log10_mel), 13)
    # Cosines are orthogonal, so the best fit of the series to the spectrum has the coefficients themselves.
    series = np.cos(np.pi / 80 * np.outer(np.arange(80) + 0.5, np.arange(14)))
    fit = np.linalg.lstsq(series, np.log(10) * log10_mel.T.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(cepstra, fit[1:].T, atol=1e-5)


def test_distance_is_zero_for_the_same_sound_whatever_its_level():
    speech = recording(0)
    assert mel_cepstral_distortion(speech, speech) == 0
    assert mel_cepstral_distortion(speech, speech / 4) < 0.01
    assert log_f0_rmse(speech, speech) == 0


@pytest.mark.parametrize("order, depth_db", [(1, 6), (3, 2)])
def test_distance_is_in_decibels(order, depth_db):
    """A filter whose gain in dB is a cosine over the mel bands moves one coefficient: its RMS is depth / sqrt(2)."""
    speech = recording(3)
    edges = np.linspace(*hertz_to_mel(np.array([80.0, 7600.0]), "slaney"), 82)
    mels = hertz_to_mel(np.fft.rfftfreq(len(speech), 1 / RATE), "slaney")
    band = np.interp(mels, edges, np.arange(82) - 1.0)
    gain_db = depth_db * np.cos(np.pi * order * (band + 0.5) / 80)
    filtered = np.fft.irfft(np.fft.rfft(speech) * 10 ** (gain_db / 20), len(speech)).astype(np.float32)
    assert mel_cepstral_distortion(filtered, speech) == pytest.approx(depth_db / np.sqrt(2), rel=0.02)


def test_distance_forgives_tempo_but_not_another_speaker():
    speech = recording(18)  # slt: three seven eight
    tempo = [mel_cepstral_distortion(stretched(speech, rate), speech) for rate in (0.8, 1.25)]
    other_voice = mel_cepstral_distortion(recording(144), speech)  # awb: three seven eight
    assert max(tempo) < 3 < 5 < other_voice
    assert (
        log_f0_rmse(stretched(speech, 0.8), speech) < 2 * SEMITONE < 5 * SEMITONE < log_f0_rmse(recording(144), speech)
    )


def test_silence_around_the_speech_does_not_count():
    speech = recording(0)
    hiss = np.random.default_rng(0).standard_normal(len(speech) + RATE).astype(np.float32)
    padded = np.pad(speech, (RATE // 4, 3 * RATE // 4)) + 1e-4 * hiss
    seconds = abs(len(mel_cepstra(padded)) - len(mel_cepstra(speech))) * 0.016
    assert seconds < 0.1
    assert mel_cepstral_distortion(padded, speech) < 2


@pytest.mark.parametrize("sound", [np.zeros(0), np.zeros(8000), np.full(8000, np.nan)], ids=["empty", "zero", "nan"])
def test_no_sound_has_no_distance(sound):
    speech = recording(0)
    assert mel_cepstra(sound).shape == (0, 13)
    assert log_f0(sound).shape == (0,)
    assert mel_cepstral_distortion(sound, speech) is None
    assert log_f0_rmse(speech, sound) is None


def test_a_few_samples_are_enough():
    assert mel_cepstral_distortion(voiced_sound(120)[:512], recording(0)) > 1
    assert mel_cepstra(np.array([0.1])).shape[1] == 13


def naive_warping(a, b):
    """The least sum of distances from the first pair to each pair: the definition, cell by cell."""
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            distance = np.sqrt(((a[i] - b[j]) ** 2).sum())
            total[i + 1, j + 1] = distance + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return total[-1, -1]


@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (7, 1), (20, 31), (31, 20), (25, 25)])
def test_warping_is_the_cheapest_path(n, m):
    rng = np.random.default_rng(n * m)
    a, b = rng.standard_normal((n, 3)), rng.standard_normal((m, 3))
    path, distances = align(a, b)
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [n - 1, m - 1]
    assert {tuple(step) for step in np.diff(path, axis=0).tolist()} <= {(0, 1), (1, 0), (1, 1)}
    np.testing.assert_allclose(distances, np.linalg.norm(a[path[:, 0]] - b[path[:, 1]], axis=1))
    assert distances.sum() == pytest.approx(naive_warping(a, b))


def test_warping_finds_repeated_frames():
    a = np.arange(5.0)[:, None]
    path, distances = align(a, np.repeat(a, [1, 3, 1, 2, 1], axis=0))
    assert distances.sum() == 0
    assert path[:, 0].tolist() == [0, 1, 1, 1, 2, 3, 3, 4]


# pitch


@pytest.mark.parametrize("f0_hz", [65, 88, 120, 180, 250, 333, 440])
def test_pitch_of_a_tone(f0_hz):
    found = np.exp(log_f0(voiced_sound(f0_hz)))[4:-4]
    np.testing.assert_allclose(found, f0_hz, rtol=0.01)


def test_pitch_of_a_glide():
    f0_hz = np.geomspace(90, 300, 2 * RATE)
    found = log_f0(voiced_sound(f0_hz, 2.0))
    assert len(found) == 1 + 2 * RATE // 256 == len(mel_cepstra(voiced_sound(f0_hz, 2.0)))
    np.testing.assert_allclose(np.exp(found[:-1])[4:-4], f0_hz[::256][4 : len(found) - 5], rtol=0.01)


def test_noise_has_no_pitch():
    assert np.isnan(log_f0(np.random.default_rng(0).standard_normal(RATE).astype(np.float32))).all()


@pytest.mark.parametrize(
    "number, f0_hz", [(18, 180), (29, 88), (47, 105), (144, 115)], ids=["slt", "rms", "kal16", "awb"]
)
def test_pitch_of_voices_is_what_they_were_asked_for(number, f0_hz):
    """`make.py` asks for the voice's own pitch, from 10 % lower to 12 % higher; part of the speech is unvoiced."""
    found = log_f0(recording(number))
    voiced = found[~np.isnan(found)]
    assert 0.25 < len(voiced) / len(found) < 0.9
    assert 0.85 * f0_hz < np.exp(np.median(voiced)) < 1.2 * f0_hz
    assert (abs(voiced - np.median(voiced)) > 0.5).mean() < 0.05  # octave errors are 0.69 away


def test_pitch_distance_of_a_semitone():
    a, b = voiced_sound(150), voiced_sound(150 * np.exp(SEMITONE))
    assert log_f0_rmse(a, b) == pytest.approx(SEMITONE, rel=0.05)


# stops and words


@pytest.mark.parametrize(
    "seconds, is_unfinished, expected",
    [(2, False, "ok"), (1.39, False, "early"), (1.41, False, "ok"), (2.79, False, "ok"), (2.81, False, "late"),
     (0, False, "early"), (2, True, "never")],
)  # fmt: skip
def test_stop_health(seconds, is_unfinished, expected):
    assert stop_health(seconds, 2.0, is_unfinished) == expected


@pytest.mark.parametrize(
    "heard, asked, expected",
    [
        ("four two nine", "four two nine", (0, 0)),
        ("four two two nine", "four two nine", (1, 0)),  # twice
        ("four two oh nine", "four two nine", (1, 0)),  # inserted
        ("four nine", "four two nine", (0, 1)),
        ("four four nine", "four two nine", (1, 1)),  # twice, in place of the next
        ("four to nine", "four two nine", (0, 0)),  # wrong, but neither
        ("two two two", "two two two", (0, 0)),
        ("two two", "two two two", (0, 1)),
        ("", "four two", (0, 2)),
        ("four two", "", (2, 0)),
        ("4229", "429", (1, 0)),  # as the English normaliser writes digits
        ("49", "429", (0, 1)),
    ],
)
def test_repeated_and_skipped(heard, asked, expected):
    assert repeated_and_skipped(heard, asked) == expected


# the whole score


class Judge:
    """Knows what was said in the shipped recordings, whatever their level, and counts what it is asked."""

    def __init__(self, rows):
        self.texts = {self.shape(row["reference"]): row["text"] for row in rows}
        self.num_heard = self.num_embedded = 0

    @staticmethod
    def shape(waveform):
        return (np.round(waveform / np.abs(waveform).max(), 3) + 0.0).tobytes()

    def recognise(self, waveforms):
        self.num_heard += len(waveforms)
        return [self.texts.get(self.shape(waveform), "") for waveform in waveforms]

    def embed(self, waveforms):
        self.num_embedded += len(waveforms)
        cepstra = [torch.from_numpy(mel_cepstra(waveform)).float() for waveform in waveforms]
        means = torch.stack([frames.mean(dim=0) for frames in cepstra])
        return torch.nn.functional.normalize(means, dim=-1)


NUM_ROWS = 8


def make_rows():
    """Rows of the test set as synthesis would give them, with one fault each from the fourth on."""
    with open(FOLDER / "metadata.csv", newline="") as file:
        listed = list(csv.DictReader(file))[:NUM_ROWS]
    rows = []
    for index, row in enumerate(listed):
        speech = decode(FOLDER / row["file_name"])
        rows.append(
            {"index": index, "text": row["text"], "speaker": row["speaker"], "gender": "ab"[row["speaker"] == "slt"],
             "reference": speech, "vocoded": speech / 2, "waveform": speech / 4, "is_unfinished": False}
        )  # fmt: skip
    rows[3]["waveform"] = rows[0]["reference"]  # another text; its voice is the same
    rows[4]["waveform"] = np.zeros(0, np.float32)
    rows[5]["waveform"] = np.zeros(8000, np.float32)
    rows[6]["waveform"] = np.full(8000, np.nan, np.float32)
    rows[7]["waveform"], rows[7]["is_unfinished"] = np.tile(rows[7]["reference"], 3), True
    return rows


@pytest.fixture(scope="module")
def scored():
    rows = make_rows()
    judge = Judge(rows)
    compute_metrics = SynthesisScore(judge.recognise, judge.embed, ["gender"], name="basic")
    return compute_metrics(rows), rows, judge, compute_metrics


def test_rows_keep_their_numbers_and_lose_their_sound(scored):
    _, rows, *_ = scored
    expected = {"index", "text", "speaker", "gender", "is_unfinished", "prediction", "mcd", "log_f0_rmse",
                "speaker_similarity", "duration_ratio", "stop"}  # fmt: skip
    assert all(set(row) == expected for row in rows)
    json.dumps(rows, allow_nan=False)
    assert [row["prediction"] for row in rows[:4]] == [rows[n]["text"] for n in (0, 1, 2, 0)]
    for row in rows[:3]:
        assert row["mcd"] < 0.01 and row["log_f0_rmse"] < 0.01
        assert row["speaker_similarity"] == pytest.approx(1, abs=1e-5)
        assert 1 < row["duration_ratio"]  # the shipped recordings have silence around the speech
    assert rows[3]["mcd"] > 3
    for row in rows[4:7]:
        assert (row["prediction"], row["mcd"], row["log_f0_rmse"], row["speaker_similarity"]) == ("", None, None, None)
    assert (rows[4]["duration_ratio"], rows[4]["stop"], rows[7]["stop"]) == (0, "early", "never")


def test_score_has_error_rates_and_measures_with_intervals(scored):
    result, rows, *_ = scored
    json.dumps(result, allow_nan=False)
    rates = score(
        [row["prediction"] for row in rows], [row["text"] for row in rows], [row["speaker"] for row in rows],
        {"gender": [row["gender"] for row in rows]}, "basic",
    )  # fmt: skip
    assert {key: result[key] for key in rates if key != "groups"} == {k: v for k, v in rates.items() if k != "groups"}
    assert result["interval"] == "bootstrap over 8 rows"
    assert result["measured_rows"] == {"mcd": 5, "log_f0_rmse": 5, "speaker_similarity": 5, "duration_ratio": 8}
    for measure in ("mcd", "log_f0_rmse", "speaker_similarity", "duration_ratio"):
        known = [row[measure] for row in rows if row[measure] is not None]
        assert result[measure] == pytest.approx(np.mean(known))
        assert result[f"{measure}_low"] < result[measure] < result[f"{measure}_high"]
    for stop, share in result["stop"].items():
        assert share == sum(row["stop"] == stop for row in rows) / 8
    assert result["stop"]["never"] == 1 / 8
    assert result["skipped_words"] >= sum(len(row["text"].split()) for row in rows[4:7])


def test_groups_have_the_same_measures(scored):
    result, rows, *_ = scored
    for value in "ab":
        group, own = result["groups"]["gender"][value], [row for row in rows if row["gender"] == value]
        assert group["rows"] == len(own)
        assert group["mcd"] == pytest.approx(np.mean([row["mcd"] for row in own if row["mcd"] is not None]))
        assert set(result) - set(group) == {
            "substitutions", "insertions", "deletions", "hits", "empty_references", "raw_wer", "raw_cer",
            "normalizer", "groups", "ceiling",
        }  # fmt: skip
    for count in ("repeated_words", "skipped_words"):
        assert sum(group[count] for group in result["groups"]["gender"].values()) == result[count]


def test_ceiling_is_that_of_the_recordings_and_costs_once(scored):
    result, _, judge, compute_metrics = scored
    assert result["ceiling"]["recordings"] == {"wer": 0, "cer": 0}
    vocoded = result["ceiling"]["vocoded"]
    assert (vocoded["wer"], vocoded["cer"]) == (0, 0)
    assert vocoded["mcd"] < 0.01 and vocoded["speaker_similarity"] == pytest.approx(1, abs=1e-5)

    # Five rows can be heard; the first call of both also had eight recordings and eight vocoded ones.
    before = judge.num_heard, judge.num_embedded
    again = compute_metrics(make_rows())
    assert (judge.num_heard - before[0], judge.num_embedded - before[1]) == (5, 5)
    assert again == result


def test_score_when_nothing_can_be_heard():
    rows = [{**row, "waveform": np.zeros(0, np.float32)} for row in make_rows()[:2]]
    judge = Judge(rows)
    result = SynthesisScore(judge.recognise, judge.embed)(rows)
    assert result["normalizer"] == "english"
    assert (result["wer"], result["mcd"], result["mcd_low"], result["speaker_similarity"]) == (1, None, None, None)
    assert result["measured_rows"]["mcd"] == 0
    assert result["skipped_words"] == 8  # two rows of four digits, which the normaliser joins
    json.dumps(result, allow_nan=False)


def test_means_over_known_rows_have_the_interval_of_a_ratio():
    known_twice, known_once = [[2.0, 1], [0, 0], [4, 1]], [[0, 0], [3, 1], [0, 0]]
    (twice, once), interval = ratios(np.hstack([known_twice, known_once]))
    assert twice == (3, 2, 4)  # resamples of the three rows hold both values or one of them
    assert once == (3, None, None)  # a single value has a mean, but nothing says how far to trust it
    assert interval == "bootstrap over 3 rows"


def test_intervals_are_over_speakers_where_there_are_enough():
    rows = [{**row, "speaker": f"voice {row['index'] % 5}"} for row in make_rows()]
    judge = Judge(rows)
    assert SynthesisScore(judge.recognise, judge.embed)(rows)["interval"] == "bootstrap over 5 speakers"


def test_sound_of_a_few_frames_reaches_the_judges_with_silence_behind_it():
    rows = make_rows()[:1]
    rows[0]["waveform"] = rows[0]["reference"][9000:9512]
    judge, seen = Judge(rows), []

    def recognise(waveforms):
        seen.extend(len(waveform) for waveform in waveforms)
        return judge.recognise(waveforms)

    result = SynthesisScore(recognise, judge.embed)(rows)
    assert min(seen) == RATE // 2
    assert (rows[0]["stop"], result["measured_rows"]["mcd"], result["mcd_low"]) == ("early", 1, None)


def test_mistakes_are_explained():
    rows = make_rows()[:2]
    judge = Judge(rows)
    rows[1]["reference"] = np.zeros(8000, np.float32)
    with pytest.raises(UserError, match="Row 1: the true recording has no sound"):
        SynthesisScore(judge.recognise, judge.embed)(rows)
    with pytest.raises(UserError, match="Did you mean basic"):
        SynthesisScore(judge.recognise, judge.embed, name="bacis")
