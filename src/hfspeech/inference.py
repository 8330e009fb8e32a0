"""Inference with any Whisper: recordings of any length in, segments of text with their times out."""

import collections
import itertools
import logging

import numpy as np
import torch

from .batching import TAIL_S, LongestFirstSampler, WhisperCollator
from .errors import UserError
from .modeling.whisper import VariableLengthEncoder, cut_at_bounds, make_fast, token_bounds
from .models.whisper import load_for_inference

FRAME_S = 0.02  # step at which loudness is measured
SMOOTHING_FRAMES = 10  # loudness is averaged over 0.2 s: shorter gaps are stops inside a word, not pauses
MARGIN_FRAMES = 5  # 0.1 s kept around sound, so that no soft onset is cut off
PAUSES_EQUAL_DB = 6.0
SILENCE_DB = -90.0  # a recording that never rises above this, against full scale, holds nothing

SORTED_BATCHES = 8  # pieces are sorted by length within so many batches

TIMESTAMPS = ("pauses", "model")

logger = logging.getLogger("hfspeech")


def transcribe(
    model, processor, waveforms, batch_size=16, max_piece_s=None, timestamps="pauses", encoder_window=None,
    on_progress=None,
):  # fmt: skip
    """Transcribes recordings of any length, with the times of what was said.

    A recording is cut in pauses into pieces that fit the model's window, silence between them is left out. Pieces of
    like length share batches, whichever recording they come from, and are decoded greedily as the model's generation
    config says. This works for every Whisper, also for one that was tuned without timestamps.

    Args:
        model: `WhisperForConditionalGeneration`, such as `load_for_inference` returns.
        processor: its `WhisperProcessor`.
        waveforms: iterable of float32 arrays of shape (samples,), mono, at the processor's sampling rate. They are
            drawn as they are needed.
        batch_size: pieces decoded at once.
        max_piece_s: longest piece in seconds. Default: the model's window.
        timestamps: `pauses`: one segment for each piece, its times taken from the sound; `model`: the timestamp
            tokens that the model writes inside each piece, for finer segments.
        encoder_window: `full` pads every piece to the model's window, as stock inference does; `auto` pads a batch to
            its longest piece, which is several times faster for short ones, but right only for a model that was
            trained so. Default: how this model was trained.
        on_progress: callable that gets the seconds of audio done since its last call.

    Yields:
        For each recording, in order, a list of dicts with `start_s`, `end_s` (seconds from its beginning) and `text`.

    Raises:
        UserError: timestamps are asked of a model that has no tokens for them.
    """
    num_unfinished = 0
    found = _transcribe(model, processor, waveforms, batch_size, max_piece_s, timestamps, encoder_window, on_progress)
    for segments, num_cut in found:
        num_unfinished += num_cut
        yield segments
    if num_unfinished:
        logger.warning("%d pieces were cut off at the number of tokens that their length allows", num_unfinished)


def _transcribe(model, processor, waveforms, batch_size, max_piece_s, timestamps, encoder_window, on_progress):
    """Yields for each recording its segments, and how many of its pieces reached the bound on their tokens."""
    if timestamps == "model" and getattr(model.generation_config, "no_timestamps_token_id", None) is None:
        raise UserError("This model has no timestamp tokens: leave --timestamps at pauses.")
    extractor = processor.feature_extractor
    rate = extractor.sampling_rate
    limit_s = min(max_piece_s or extractor.chunk_length, extractor.chunk_length)
    encoder_window = encoder_window or getattr(model.generation_config, "encoder_window", "full")
    if not isinstance(model.model.encoder, VariableLengthEncoder):  # it was loaded by stock code
        make_fast(model)
    recordings, queue = collections.deque(), []
    for waveform in itertools.chain(waveforms, [None]):  # None: no more will come, so the queue is emptied
        if waveform is not None:
            spans = find_pieces(waveform, rate, limit_s)
            done = [None] * len(spans)
            before = [0, *(end for _, end in spans)]
            recordings.append((done, len(waveform) - before[-1]))
            for place, ((start, end), last) in enumerate(zip(spans, before)):
                queue.append((waveform[start:end], done, place, start, end - last))
        if len(queue) < SORTED_BATCHES * batch_size and waveform is not None:
            continue
        queue.sort(key=lambda entry: -len(entry[0]))
        while queue:
            batch, queue = queue[:batch_size], queue[batch_size:]
            found = _transcribe_pieces(model, processor, [piece for piece, *_ in batch], timestamps, encoder_window)
            for (_, done, place, start, _), (segments, is_cut) in zip(batch, found):
                done[place] = [_shifted(segment, start / rate) for segment in segments if segment["text"]], is_cut
            if on_progress:
                on_progress(sum(samples for *_, samples in batch) / rate)
        while recordings and None not in recordings[0][0]:
            done, silence = recordings.popleft()
            if on_progress and silence:
                on_progress(silence / rate)
            yield [segment for segments, _ in done for segment in segments], sum(is_cut for _, is_cut in done)


def find_pieces(waveform, sampling_rate, max_piece_s):
    """Cuts a recording in its pauses into pieces of at most `max_piece_s` seconds, without the silence around them.

    Loudness is measured every 20 ms over 0.2 s. Sound is what lies above a threshold between the recording's noise
    floor (its tenth percentile) and its loudest moment: 6 dB over the floor, but from 20 to 40 dB below the loudest,
    so that neither noise nor a recording without pauses loses speech. A piece that would be too long is cut in the
    second half of the limit where that is quietest; of pauses that are about as quiet, in the last.

    Args:
        waveform: float array of shape (samples,).
        sampling_rate: in Hz.
        max_piece_s: in seconds.

    Returns:
        list of (start, end) in samples, in order, without overlap; empty if there is no sound.
    """
    if len(waveform) == 0:
        return []
    frame = round(FRAME_S * sampling_rate)
    level = _loudness_db(np.asarray(waveform, dtype=np.float32), frame)
    loudest = level.max()
    if loudest < SILENCE_DB:
        return []
    threshold = np.clip(np.percentile(level, 10) + 6, loudest - 40, loudest - 20)
    sound = np.flatnonzero(_sum_of_neighbours(level > threshold, 2 * MARGIN_FRAMES + 1))
    limit = max(int(max_piece_s / FRAME_S), 1)
    pieces, position = [], 0
    while (first := np.searchsorted(sound, position)) < len(sound):
        start = sound[first]
        cut = len(level)
        if cut - start > limit:
            half = start + max(limit // 2, 1)
            window = level[half : start + limit + 1]
            cut = half + int(np.flatnonzero(window <= window.min() + PAUSES_EQUAL_DB)[-1])
        end = sound[np.searchsorted(sound, cut) - 1] + 1
        pieces.append((int(start) * frame, min(int(end) * frame, len(waveform))))
        position = cut
    return pieces


class Listener:
    """A Whisper that writes down what it hears: the judge of synthesised speech.

    Args:
        name_or_path: Hub id or folder of a Whisper, or of an adapter of one.
        language: name or code; None for what the model's generation config says.
        batch_size: recordings heard at once.

    Calling it with a list of float32 waveforms (16 kHz) returns a list of texts.
    """

    def __init__(self, name_or_path, language=None, batch_size=16):
        self.model, self.processor = load_for_inference(name_or_path, language=language)
        self.name, self.hub_commit, self.batch_size = str(name_or_path), self.model.hub_commit, batch_size

    def __call__(self, waveforms):
        return [joined(segments) for segments in transcribe(self.model, self.processor, waveforms, self.batch_size)]


def evaluate_rows(
    model, processor, dataset, compute_metrics, batch_size=32, on_bad_audio="error", num_workers=0,
    encoder_window="full", on_progress=None,
):  # fmt: skip
    """Transcribes every row of a dataset, the longest first, and scores what was recognised.

    A row that fits the model's window is decoded as the trainer decodes it; a longer one is cut in its pauses (see
    `transcribe`), never cut off. The score has the number of rows that were cut off at the number of tokens which
    their length allows, as `unfinished`.

    Args:
        model, processor: as for `transcribe`.
        dataset: `SpeechDataset`.
        compute_metrics: callable from a list of rows (dicts of `text`, `prediction` and the dataset's columns) to a
            dict, such as `TranscriptScore`.
        batch_size: rows decoded at once; unpadded, more short ones at the same cost.
        on_bad_audio: `error` or `skip`: what a row that cannot be decoded does.
        num_workers: processes that decode audio.
        encoder_window: as for `transcribe`; `full` is what any other tool would find.
        on_progress: callable that gets the number of rows done since its last call.

    Returns:
        (what `compute_metrics` returned, the rows with their `prediction` in the dataset's order, and a sentence for
        every row left out because of its audio).

    Raises:
        UserError: audio cannot be decoded and `on_bad_audio` is `error`, or no row is left.
    """
    on_progress = on_progress or (lambda rows: None)
    if not isinstance(model.model.encoder, VariableLengthEncoder):  # it was loaded by stock code
        make_fast(model)
    window_s = processor.feature_extractor.chunk_length
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=LongestFirstSampler(dataset.column("duration_s"), window_s, batch_size, encoder_window),
        collate_fn=_EvaluationCollator(processor),
        num_workers=num_workers,
    )
    texts, long_rows, bad_audio, num_unfinished = {}, [], [], 0
    for batch in loader:
        if batch["fatal"]:
            raise UserError(batch["fatal"][0])
        for sentence in batch["bad_audio"]:
            if on_bad_audio == "error":
                raise UserError(f"{sentence}. Leave such rows out with --on_bad_audio skip.")
            bad_audio.append(sentence)
        long_rows += batch["long"]
        if batch["index"]:
            tokens, is_cut = _generate(model, processor, batch["input_features"], batch["duration_s"])
            num_unfinished += sum(is_cut)
            decoded = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            texts.update(zip(batch["index"], (text.strip() for text in decoded)))
        on_progress(len(batch["index"]) + len(batch["bad_audio"]))
    waveforms = (dataset[index]["waveform"] for index in long_rows)
    found = _transcribe(model, processor, waveforms, batch_size, None, "pauses", encoder_window, None)
    for index, (segments, num_cut) in zip(long_rows, found):
        num_unfinished += bool(num_cut)
        texts[index] = joined(segments)
        on_progress(1)
    rows = [{**dataset.record(index), "prediction": text} for index, text in sorted(texts.items())]
    if not rows:
        raise UserError(f"Nothing is left to evaluate: every row is unreadable, the first one is: {bad_audio[0]}.")
    return {**compute_metrics(rows), "unfinished": num_unfinished}, rows, bad_audio


def joined(segments):
    """Returns the text of a recording from its segments."""
    return " ".join(segment["text"] for segment in segments)


class _EvaluationCollator:
    """Makes features of the rows that fit the window, in the dataloader's workers, and sets the longer ones apart."""

    def __init__(self, processor):
        self.collator = WhisperCollator(processor)
        self.max_samples = processor.feature_extractor.n_samples

    def __call__(self, rows):
        good = [row for row in rows if row["waveform"] is not None]
        short = [row for row in good if len(row["waveform"]) <= self.max_samples]
        waveforms, padded_s = [row["waveform"] for row in short], max((row["padded_s"] for row in rows), default=None)
        return {
            "index": [row["index"] for row in short],
            "input_features": self.collator.features(waveforms, padded_s) if short else None,
            "duration_s": [row["duration_s"] for row in short],
            "long": [row["index"] for row in good if len(row["waveform"]) > self.max_samples],
            "bad_audio": [row["bad_audio"] for row in rows if row.get("bad_audio")],
            "fatal": [row["fatal"] for row in rows if row.get("fatal")],
        }


def _transcribe_pieces(model, processor, pieces, timestamps, encoder_window):
    """Returns, for each piece, its segments, their times counted from its beginning, and whether it was cut off."""
    rate = processor.feature_extractor.sampling_rate
    decode = processor.tokenizer.decode
    durations = [len(piece) / rate for piece in pieces]
    padded_s = max(durations) + TAIL_S if encoder_window == "auto" else None
    features = WhisperCollator(processor).features(pieces, padded_s)
    if timestamps == "pauses":
        tokens, is_cut = _generate(model, processor, features, durations)
        texts = [decode(row, skip_special_tokens=True).strip() for row in tokens]
        segments = [[{"start_s": 0.0, "end_s": end, "text": text}] for end, text in zip(durations, texts)]
        return list(zip(segments, is_cut))
    found, is_cut = _generate(model, processor, features, durations, return_timestamps=True, return_segments=True)
    # The window is padded, so a timestamp may lie behind the end of the piece.
    segments = [
        [
            {
                "start_s": min(float(segment["start"]), duration),
                "end_s": min(float(segment["end"]), duration),
                "text": decode(segment["tokens"], skip_special_tokens=True).strip(),
            }
            for segment in segments
        ]
        for segments, duration in zip(found["segments"], durations)
    ]
    return list(zip(segments, is_cut))


@torch.no_grad()
def _generate(model, processor, features, durations_s, **options):
    """Returns what `generate` makes of a batch, and a list of bool: which rows reached the bound on their tokens."""
    # Encoded here, because generate pads short features with zeros, which are loud; and once also where the language
    # has to be guessed.
    encoded = model.model.encoder(features.to(model.device, model.dtype))
    bounds, eos_token_id = token_bounds(durations_s, model.config), processor.tokenizer.eos_token_id
    found = model.generate(encoder_outputs=encoded, max_new_tokens=max(bounds), **options)
    if options.get("return_segments"):
        return found, cut_at_bounds(found["sequences"], bounds, eos_token_id)[1]
    return cut_at_bounds(found, bounds, eos_token_id)


def _shifted(segment, seconds):
    times = {name: round(segment[name] + seconds, 3) for name in ("start_s", "end_s")}
    return {**times, "text": segment["text"]}


def _loudness_db(waveform, frame):
    """Returns the loudness in dB against full scale, one number for each frame, averaged over neighbouring ones."""
    whole = len(waveform) // frame * frame
    frames = waveform[:whole].reshape(-1, frame)
    power = np.einsum("ij,ij->i", frames, frames) / frame
    if whole < len(waveform):
        power = np.append(power, np.square(waveform[whole:]).mean())
    smooth = _sum_of_neighbours(power, SMOOTHING_FRAMES) / SMOOTHING_FRAMES
    return 10 * np.log10(np.maximum(smooth, 1e-12))


def _sum_of_neighbours(values, width):
    return np.convolve(values, np.ones(width))[width // 2 :][: len(values)]
