"""Tests of inference: where recordings are cut, what comes back in which order, and that it agrees with stock code."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from hfspeech.arguments import DataArguments
from hfspeech.audio import _torchcodec, decode, write
from hfspeech.data import load_split
from hfspeech.errors import UserError
from hfspeech.inference import SORTED_BATCHES, evaluate_rows, find_pieces, joined, transcribe
from hfspeech.metrics import TranscriptScore
from hfspeech.modeling.whisper import make_fast
from hfspeech.models.whisper import load_for_inference

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano_whisper"
CLIPS = ASSETS / "espeak_digits" / "test"
RATE = 16000
WINDOW_S = 5


@pytest.fixture(scope="module")
def untrained():
    """The nano Whisper's shape with random weights: enough for everything but the words."""
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(NANO)).eval()
    model.generation_config = GenerationConfig.from_pretrained(NANO)
    make_fast(model)
    return model, WhisperProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def trained():
    return load_for_inference(NANO)


def clip(number):
    return decode(CLIPS / f"{number:05}.ogg")


def clip_texts():
    with open(CLIPS / "metadata.csv", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def tones(*spans, seconds, noise=0.0):
    """A recording with a tone in each span of seconds, over white noise."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE)) / RATE
    on = sum(((time >= start) & (time < end)).astype(float) for start, end in spans)
    return (0.3 * on * np.sin(2 * np.pi * 440 * time) + noise * rng.standard_normal(len(time))).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_pieces_are_cut_in_pauses_and_hold_all_sound(noise):
    spans = [(0.5, 2.0), (2.4, 4.2), (4.6, 6.8), (12.0, 13.0)]
    waveform = tones(*spans, seconds=20, noise=noise)
    pieces = [(start / RATE, end / RATE) for start, end in find_pieces(waveform, RATE, WINDOW_S)]
    for start, end in spans:
        assert sum(a <= start and end <= b for a, b in pieces) == 1, (start, end, pieces)
    assert all(b - a <= WINDOW_S for a, b in pieces)
    assert all(b <= c for (_, b), (c, _) in zip(pieces, pieces[1:]))
    assert sum(b - a for a, b in pieces) < 9, "silence is left out"


def test_speech_without_pauses_is_cut_but_not_lost():
    waveform = tones(seconds=12, noise=0.1)
    pieces = find_pieces(waveform, RATE, WINDOW_S)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(waveform)
    assert all(b == c for (_, b), (c, _) in zip(pieces, pieces[1:]))
    assert max(b - a for a, b in pieces) <= WINDOW_S * RATE


@pytest.mark.parametrize("samples", [0, 1, 100, RATE])
def test_silence_holds_no_piece(samples):
    assert find_pieces(np.zeros(samples, np.float32), RATE, WINDOW_S) == []


@pytest.mark.parametrize("timestamps", ["pauses", "model"])
def test_every_recording_gets_its_segments_in_order_whatever_the_batch(untrained, timestamps):
    long = np.concatenate([clip(i) for i in range(4)])
    waveforms = [clip(0), np.zeros(RATE, np.float32), long, clip(1)]
    progress = []
    results = [
        list(transcribe(*untrained, waveforms, batch_size, timestamps=timestamps, on_progress=progress.append))
        for batch_size in (1, 3)
    ]
    assert results[0] == results[1]
    assert len(results[0]) == 4
    assert results[0][1] == []
    for waveform, segments in zip(waveforms, results[0]):
        times = [segment[name] for segment in segments for name in ("start_s", "end_s")]
        assert times == sorted(times)
        assert all(0 <= time <= len(waveform) / RATE + 0.001 for time in times)
    assert sum(progress) / 2 == pytest.approx(sum(map(len, waveforms)) / RATE)


def test_recordings_are_drawn_only_when_needed(trained):
    """Some batches' worth, so that pieces of like length find each other, but not a whole corpus."""
    drawn = []

    def waveforms():
        for i in range(100):
            drawn.append(i)
            yield clip(0)

    next(transcribe(*trained, waveforms(), batch_size=2))
    assert drawn == list(range(2 * SORTED_BATCHES))


@pytest.mark.parametrize("encoder_window", ["full", "auto"])
def test_pieces_share_batches_across_recordings_and_come_back_in_order(trained, encoder_window):
    """Recordings of very different lengths, more of them than are sorted at a time."""
    long = np.concatenate([clip(i) for i in range(4)])
    order = [0, long, 1, 2, long, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, long, 13, 14, 15, 16, 17, 18, 19, 20]
    waveforms = [clip(which) if isinstance(which, int) else which for which in order]
    frames = []
    hook = trained[0].model.encoder.register_forward_hook(lambda m, inputs, out: frames.append(inputs[0].shape))
    found = list(transcribe(*trained, waveforms, batch_size=2, encoder_window=encoder_window))
    hook.remove()
    assert len(found) == len(waveforms)
    for waveform, segments in zip(waveforms, found):
        spans = [(start / RATE, end / RATE) for start, end in find_pieces(waveform, RATE, WINDOW_S)]
        np.testing.assert_allclose([(s["start_s"], s["end_s"]) for s in segments], spans, atol=0.001)
    if encoder_window == "full":
        assert {shape[-1] for shape in frames} == {250}
        texts = clip_texts()
        heard = [joined(s) == texts[which] for which, s in zip(order, found) if isinstance(which, int)]
        assert np.mean(heard) > 0.7
        # Whatever the neighbours, a recording's text is that of itself alone.
        alone = [next(transcribe(*trained, [waveform], encoder_window="full")) for waveform in waveforms[:4]]
        assert alone == found[:4]
    else:
        assert len({shape[-1] for shape in frames}) > 4 and all(shape[-1] % 2 == 0 for shape in frames)


def test_pieces_of_like_length_share_a_batch(trained):
    lengths = []
    hook = trained[0].model.encoder.register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].shape[-1]))
    list(transcribe(*trained, [clip(i) for i in range(12)], batch_size=3, encoder_window="auto"))
    hook.remove()
    assert len(lengths) == 4 and lengths == sorted(lengths, reverse=True)


def test_a_model_is_heard_as_it_was_trained_unless_told_otherwise(trained):
    model, frames = trained[0], []
    hook = model.model.encoder.register_forward_hook(lambda m, inputs, out: frames.append(inputs[0].shape[-1]))
    assert not hasattr(model.generation_config, "encoder_window")  # as any model of the Hub
    try:
        list(transcribe(*trained, [clip(0)]))
        model.generation_config.encoder_window = "auto"
        list(transcribe(*trained, [clip(0)]))
        list(transcribe(*trained, [clip(0)], encoder_window="full"))
    finally:
        del model.generation_config.encoder_window
        hook.remove()
    assert frames[0] == frames[2] == 250 and frames[1] < 200


def test_a_tuned_model_that_stock_code_loaded_is_heard_alike(trained):
    model = WhisperForConditionalGeneration.from_pretrained(NANO).eval()
    model.generation_config.encoder_window = "auto"
    heard = [
        next(transcribe(m, trained[1], [clip(0)], encoder_window=w)) for m, w in ((model, None), (trained[0], "auto"))
    ]
    assert heard[0] == heard[1]


@pytest.mark.parametrize("timestamps", ["pauses", "model"])
def test_full_is_stock_inference(trained, timestamps):
    model, processor = trained
    stock = WhisperForConditionalGeneration.from_pretrained(NANO).eval()
    for number in range(4):
        (start, end), *others = find_pieces(clip(number), RATE, WINDOW_S)
        assert not others
        features = processor(clip(number)[start:end], sampling_rate=RATE, return_tensors="pt").input_features
        options = {"language": "en", "task": "transcribe", "return_timestamps": timestamps == "model"}
        tokens = stock.generate(features, **options)
        text = processor.batch_decode(tokens, skip_special_tokens=True)[0]
        found = next(transcribe(model, processor, [clip(number)], timestamps=timestamps, encoder_window="full"))
        assert joined(found).split() == text.split()


def test_pieces_that_reach_their_bound_are_told(untrained, caplog):
    with caplog.at_level("WARNING", logger="hfspeech"):
        list(transcribe(*untrained, [clip(0), clip(1)]))
    assert "2 pieces were cut off at the number of tokens that their length allows" in caplog.text
    caplog.clear()


def test_well_heard_pieces_reach_no_bound(trained, caplog):
    with caplog.at_level("WARNING", logger="hfspeech"):
        list(transcribe(*trained, [clip(i) for i in range(5)]))
    assert "cut off" not in caplog.text


def test_a_model_without_timestamp_tokens_says_so(untrained):
    model, processor = untrained
    saved = model.generation_config.no_timestamps_token_id
    model.generation_config.no_timestamps_token_id = None
    try:
        with pytest.raises(UserError, match="--timestamps"):
            next(transcribe(model, processor, [clip(0)], timestamps="model"))
    finally:
        model.generation_config.no_timestamps_token_id = saved


@pytest.fixture
def mixed_rows(tmp_path):
    """Two clips, a recording longer than the window, and one whose header promises more than there is."""
    write(tmp_path / "long.wav", np.concatenate([clip(i) for i in range(4)]))
    write(tmp_path / "broken.wav", clip(3))
    whole = (tmp_path / "broken.wav").read_bytes()
    (tmp_path / "broken.wav").write_bytes(whole[: len(whole) // 2])
    texts = clip_texts()
    rows = [
        (CLIPS / "00000.ogg", texts[0], 2.9),
        (tmp_path / "long.wav", " ".join(texts[:4]), round(sum(len(clip(i)) for i in range(4)) / RATE, 2)),
        (tmp_path / "broken.wav", texts[3], 2.1),
        (CLIPS / "00001.ogg", texts[1], 3.8),
    ]
    lines = ["file_name,text,duration", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    return load_split(DataArguments(dataset_name=[str(tmp_path)], audio_root=[str(CLIPS)]), "test")


def test_evaluation_agrees_with_stock_inference_and_leaves_out_only_what_is_broken(untrained, mixed_rows):
    model, processor = untrained
    metrics = TranscriptScore(processor, None, "basic")
    progress = []
    score, rows, bad_audio = evaluate_rows(
        model, processor, mixed_rows, metrics, batch_size=2, on_bad_audio="skip", on_progress=progress.append
    )
    assert [row["row"] for row in rows] == [1, 2, 4]
    assert score["rows"] == 3 and sum(progress) == 4
    assert len(bad_audio) == 1 and "broken.wav" in bad_audio[0]
    features = processor(clip(1), sampling_rate=RATE, return_tensors="pt").input_features
    stock = processor.batch_decode(
        model.generate(features, language="en", task="transcribe"), skip_special_tokens=True
    )
    assert rows[2]["prediction"] == stock[0].strip()
    pieces = next(transcribe(model, processor, [mixed_rows[1]["waveform"]]))
    assert len(pieces) > 1 and rows[1]["prediction"] == joined(pieces)


@pytest.mark.parametrize("encoder_window", ["full", "auto"])
def test_evaluation_finds_each_row_once_and_counts_those_cut_off(untrained, trained, mixed_rows, encoder_window):
    for (model, processor), unfinished in ((untrained, 3), (trained, 0)):
        metrics = TranscriptScore(processor, None, "basic")
        score, rows, _ = evaluate_rows(
            model, processor, mixed_rows, metrics, 2, on_bad_audio="skip", encoder_window=encoder_window
        )
        assert [row["row"] for row in rows] == [1, 2, 4] and score["rows"] == 3
        assert score["unfinished"] == unfinished, "a row that is cut off counts, however many pieces it has"


def test_evaluation_stops_at_broken_audio_unless_told_to_skip_it(untrained, mixed_rows):
    with pytest.raises(UserError, match=r"broken\.wav.*--on_bad_audio skip"):
        evaluate_rows(*untrained, mixed_rows, len)


def test_what_has_to_stop_an_evaluation_is_one_sentence(untrained, mixed_rows, tmp_path):
    if _torchcodec() is not None:
        pytest.skip("FFmpeg is here, so no format misses it")
    (tmp_path / "broken.wav").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(5000))
    with pytest.raises(UserError, match=r"M4A/MP4 audio needs FFmpeg") as caught:
        evaluate_rows(*untrained, mixed_rows, len, on_bad_audio="skip", num_workers=1)
    assert "Traceback" not in str(caught.value)


def test_the_shipped_model_writes_down_a_shipped_clip(trained):
    texts = clip_texts()
    found = [joined(segments) for segments in transcribe(*trained, [clip(i) for i in range(5)])]
    assert sum(text == right for text, right in zip(found, texts)) >= 4, list(zip(found, texts))


def test_a_long_recording_comes_back_whole_and_in_order(trained):
    texts, numbers = clip_texts(), range(8)
    gap = np.zeros(RATE // 2, np.float32)
    waveform = np.concatenate([part for i in numbers for part in (clip(i), gap)])
    # The nano Whisper has learnt strings of up to six digits, so no piece may hold more.
    segments = next(transcribe(*trained, [waveform], batch_size=4, max_piece_s=2.5))
    assert len(segments) >= 8
    assert segments[0]["start_s"] >= 0 and segments[-1]["end_s"] <= len(waveform) / RATE
    times = [segment[name] for segment in segments for name in ("start_s", "end_s")]
    assert times == sorted(times)
    score = TranscriptScore(trained[1], None, "basic")
    rows = [{"prediction": joined(segments), "text": " ".join(texts[i] for i in numbers)}]
    assert score(rows)["wer"] < 0.1
