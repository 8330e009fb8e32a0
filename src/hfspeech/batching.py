"""From decoded rows to batches: log-mel features and labels made when they are needed, in batches of like length."""

import itertools
import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .audio import SAMPLING_RATE, log_mel_spectrogram
from .text import labels_of

# A recording may outlast the model's window by this much, which is cut off: its times are rounded somewhere.
CUT_SLACK_S = 0.1
# Silence behind the longest row of an unpadded batch; `VariableLengthEncoder` tells from its end how silence sounds. In
# training its length is drawn at random, so that other positions stand for the rest of the window each time. The frames
# of speech are those of a padded recording from 200 samples of silence on.
TAIL_S = 0.6
TRAIN_TAIL_S = (0.2, 0.7)
# Unpadded batches come in few shapes: their lengths are rounded up, or a CPU's library prepares its products anew in almost
# every step and remembers each, while the memory goes to pieces of ever other sizes.
LENGTH_MULTIPLE_S = 0.32
LABELS_MULTIPLE = 8
# An evaluation batch of short rows holds at most this many times the rows that it holds at the full window.
MOST_EVAL_ROWS = 8
# What --torch_compile true is given to compile: so many lengths of audio, and labels in multiples of so many tokens.
COMPILED_LENGTHS = 16
COMPILED_LABELS = 16


# What counts as silence at the ends of a recording that speech is learnt from, and how much of it stays.
SILENCE_DB = 40
EDGE_S = 0.05
FRAME_S = 0.016  # of SpeechT5's spectrograms


class WhisperCollator:
    """Turns decoded rows into one batch for Whisper; runs in the dataloader's workers and writes nothing to disk.

    Args:
        processor: `WhisperProcessor` whose tokenizer is set to the language, task and timestamps.
        on_bad_audio: `error` or `skip`; the trainer reads it when a batch reports a row that could not be decoded.

    Calling it with a list of rows (dicts with `index`, `row`, `id`, `waveform` float32 at the processor's sampling rate
    or None, `text`, `duration_s`; where `waveform` is None `bad_audio` or `fatal` says why, or `is_encoded` that the
    encoder's output is known already; rows of a stream also have `left_out` and `place`) returns a dict:
        input_features: (batch, num_mel_bins, frames) float32, the waveforms followed by silence up to the longest
            `padded_s` of the rows, or to the whole window if they have none; without the rows that are encoded already,
            and missing if all of them are.
        padded_s: float, that number of seconds.
        is_encoded: list of bool, one for each row.
        labels: (batch, tokens) int64, right-padded with -100 to a multiple of `pad_labels_to_multiple_of`, without the
            leading start token, which Whisper adds.
        index: list of int, the rows' places in their dataset.
        duration_s: list of float, seconds of audio before padding.
        bad_audio: list of str, a sentence for every row left out of this batch.
        left_out: list of [reason, row, detail], the rows of a stream that its filters rejected.
        fatal: list of str, the faults that have to stop the run.
        place: of a stream, where its reader goes on after this batch.
    A batch without a good row has a short silence for features and nothing but -100 for labels: every process must
    take part in every step.
    """

    def __init__(self, processor, on_bad_audio="error"):
        self.processor = processor
        self.on_bad_audio = on_bad_audio
        self.pad_labels_to_multiple_of = LABELS_MULTIPLE

    def __call__(self, rows):
        bad_audio = [row["bad_audio"] for row in rows if row.get("bad_audio")]
        good = []
        for row in rows:
            if row.get("is_encoded"):
                good.append(row)
            elif row["waveform"] is not None:
                too_long = self._too_long(row)
                bad_audio += too_long
                good += [] if too_long else [row]
        is_encoded = [bool(row.get("is_encoded")) for row in good]
        waveforms = [row["waveform"] for row in good if row["waveform"] is not None]
        lengths = [row.get("padded_s") for row in good]
        padded_s = max(lengths) if lengths and None not in lengths else None
        features = {}
        if waveforms or not good:
            features["input_features"] = self.features(waveforms or [np.zeros(1600, np.float32)], padded_s)
        return {
            **features,
            "padded_s": padded_s or self.processor.feature_extractor.chunk_length,
            "is_encoded": is_encoded,
            "labels": self.labels([row["text"] for row in good], [row["duration_s"] for row in good])
            if good
            else torch.full((1, 1), -100),
            "index": [row.get("index") for row in good],
            "duration_s": [row["duration_s"] for row in good],
            "bad_audio": bad_audio,
            "left_out": [entry for row in rows for entry in row.get("left_out") or []],
            "fatal": [row["fatal"] for row in rows if row.get("fatal")],
            "place": rows[-1].get("place") if rows else None,
        }

    def _too_long(self, row):
        """Returns a sentence in a list if the window would cut off speech whose text stays, else an empty list."""
        extractor = self.processor.feature_extractor
        seconds = len(row["waveform"]) / extractor.sampling_rate
        if seconds <= extractor.chunk_length + CUT_SLACK_S:
            return []
        return [
            f"row {row['row']}, {row['id']}: lasts {seconds:.1f} s, longer than the model's window of "
            f"{extractor.chunk_length} s"
        ]

    def features(self, waveforms, padded_s=None):
        """Returns the log-mel features of 16 kHz waveforms, followed by silence.

        Args:
            waveforms: list of float arrays of shape (samples,).
            padded_s: seconds that they are to fill, at least; None for the model's whole window. More is taken for a round
                length, and where a waveform, made longer by augmentation, would lack its tail; never more than the window.

        Returns:
            float32 tensor of shape (batch, num_mel_bins, an even number of frames), a multiple of
            `LENGTH_MULTIPLE_S` or the whole window.
        """
        extractor = self.processor.feature_extractor
        samples = extractor.n_samples
        if padded_s is not None:
            two_frames = 2 * extractor.hop_length  # the encoder makes one position of two frames
            multiple = round(LENGTH_MULTIPLE_S * extractor.sampling_rate / two_frames) * two_frames
            least = max(map(len, waveforms)) + round(TRAIN_TAIL_S[0] * extractor.sampling_rate)
            wanted = max(round(padded_s * extractor.sampling_rate), least)
            samples = min(-(-wanted // multiple) * multiple, samples)
        options = {"sampling_rate": extractor.sampling_rate, "max_length": samples, "return_tensors": "pt"}
        return extractor(waveforms, **options).input_features

    def labels(self, texts, durations_s):
        """Returns the target tokens of a list of texts, (batch, tokens) int64 padded with -100."""
        ids = labels_of(self.processor.tokenizer, texts, durations_s)
        longest = max(map(len, ids))
        multiple = self.pad_labels_to_multiple_of
        labels = torch.full((len(ids), -(-longest // multiple) * multiple), -100)
        for row, tokens in enumerate(ids):
            labels[row, : len(tokens)] = torch.tensor(tokens)
        return labels


class SpeechT5Collator:
    """Turns decoded rows into one batch for SpeechT5; runs in the dataloader's workers and writes nothing to disk.

    Silence at the ends of a recording is cut off, or the model never learns when to stop.

    Args:
        processor: `SpeechT5Processor`.
        front_end: `TextFrontEnd`, from text to what is spoken and to tokens.
        voices: `Voices`, the speaker embedding of every row.
        config: `SpeechT5Config`, for the limits on text and speech.
        on_bad_audio: as for `WhisperCollator`.

    Calling it with a list of rows (see `WhisperCollator`) returns a dict:
        input_ids, attention_mask: (batch, tokens) int64, the text, padded.
        labels: (batch, frames, num_mel_bins) float32, log10 mel spectrograms padded with -100; each row has a multiple of
            `reduction_factor` frames, its last one repeated where it has not.
        speaker_embeddings: (batch, speaker_embedding_dim) float32.
        waveforms: list of float32 arrays of shape (samples,), the recordings without the silence at their ends.
        trimmed_s: list of float, seconds of silence cut off of each row.
        index, duration_s, bad_audio, left_out, fatal: as of `WhisperCollator`.
    A batch without a good row has one token, and nothing but -100 to learn.
    """

    def __init__(self, processor, front_end, voices, config, on_bad_audio="error"):
        self.processor, self.front_end, self.voices = processor, front_end, voices
        self.on_bad_audio = on_bad_audio
        self.reduction_factor = config.reduction_factor
        self.max_text_positions = config.max_text_positions
        self.max_frames = config.max_speech_positions * config.reduction_factor

    def __call__(self, rows):
        bad_audio = [row["bad_audio"] for row in rows if row.get("bad_audio")]
        good, labels, waveforms, ids = [], [], [], []
        for row in rows:
            if row["waveform"] is None:
                continue
            waveform = trimmed(row["waveform"])
            spectrogram = self.spectrogram(waveform)
            tokens = self.front_end.ids(row["text"])
            fault = self._fault(spectrogram, tokens)
            if fault:
                bad_audio.append(f"row {row['row']}, {row['id']}: {fault}")
                continue
            good.append(row)
            labels.append(spectrogram)
            waveforms.append(waveform)
            ids.append(torch.tensor(tokens))
        num_mel_bins = self.processor.feature_extractor.num_mel_bins
        if not good:
            labels, ids = (
                [torch.full((self.reduction_factor, num_mel_bins), -100.0)],
                [torch.zeros(1, dtype=torch.long)],
            )
        pad = self.processor.tokenizer.pad_token_id
        embeddings = [self.voices.of(row) for row in good] or [torch.zeros(self.voices.dim)]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100.0),
            "speaker_embeddings": torch.stack(embeddings),
            "waveforms": waveforms,
            "trimmed_s": [
                len(row["waveform"]) / SAMPLING_RATE - len(waveform) / SAMPLING_RATE
                for row, waveform in zip(good, waveforms)
            ],
            "index": [row.get("index") for row in good],
            "duration_s": [row["duration_s"] for row in good],
            "bad_audio": bad_audio,
            "left_out": [entry for row in rows for entry in row.get("left_out") or []],
            "fatal": [row["fatal"] for row in rows if row.get("fatal")],
        }

    def spectrogram(self, waveform):
        """Returns the log10 mel spectrogram of a waveform, (frames, num_mel_bins), frames a multiple of the reduction."""
        found = log_mel_spectrogram(waveform, self.processor.feature_extractor)
        missing = -len(found) % self.reduction_factor
        return torch.cat([found, found[-1:].expand(missing, -1)])

    def _fault(self, spectrogram, tokens):
        if len(spectrogram) > self.max_frames:
            return (
                f"lasts {len(spectrogram) * FRAME_S:.1f} s, longer than the model's {self.max_frames * FRAME_S:.0f} s"
            )
        if len(tokens) > self.max_text_positions:
            return f"its text has {len(tokens)} tokens, more than the model's {self.max_text_positions}"
        return None


def trimmed(waveform):
    """Returns a recording without the silence at its ends: all that is 40 dB under its loudest 25 ms, but for 50 ms."""
    waveform = np.asarray(waveform, dtype=np.float32)
    block = round(0.025 * SAMPLING_RATE)
    whole = len(waveform) // block * block
    if whole < 2 * block or not waveform.any():
        return waveform
    power = np.square(waveform[:whole].reshape(-1, block)).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-SILENCE_DB / 10))
    edge = round(EDGE_S * SAMPLING_RATE)
    return waveform[max(loud[0] * block - edge, 0) : (loud[-1] + 1) * block + edge]


class LengthBatchSampler(torch.utils.data.Sampler):
    """Draws training batches of rows of like length, all batches of one optimizer step at the same cost.

    Every pass shuffles the rows, cuts them into pools of `pool_steps` optimizer steps, sorts each pool by length, cuts
    it into whole steps and draws these in random order. Rows that fill no step wait for the next pool; at the end of a
    pass they make short steps. An epoch is as many steps as the first pass has. The order depends on the settings, the
    seed and the epoch only.

    A step's rows are the same however many batches of `batch_size` share them: 8 rows in one batch, or 4 in each of
    two. A short step may leave a batch one row fewer than its neighbours, or none.

    Yields lists of (row number, seconds to pad the waveform to).

    Args:
        durations_s: list of float, seconds of each row.
        window_s: seconds of the model's window.
        batch_size: rows in a batch; or
        max_batch_seconds: seconds in a batch, its padding counted: as many rows as fit.
        encoder_window: `auto` pads a batch to its longest row and a random tail, `full` to the whole window.
        full_window_share: share of the steps that `auto` pads to the whole window. Such a step has as many rows fewer
            as keep its cost that of the others; those left over wait for a later step.
        batches_per_step: processes times accumulation steps. Consecutive batches make a step.
        seed: int.
        length_multiple_s: round the padded length up to a multiple of so many seconds; None for no rounding.
        tail_s: seconds of silence behind the longest row of a batch that `auto` draws from, (least, most).
        same_length: put only rows together that are rounded to the same length, which has no random tail then: a
            row's padded length never changes.
        pool_steps: steps in one pool; more means less padding and less randomness.
    """

    def __init__(
        self, durations_s, window_s, batch_size=None, max_batch_seconds=None, encoder_window="auto",
        full_window_share=0.0, batches_per_step=1, seed=0, length_multiple_s=None, same_length=False, pool_steps=50,
        tail_s=TRAIN_TAIL_S,
    ):  # fmt: skip
        self.window_s = window_s
        self.batch_size = None  # its absence tells accelerate that batches differ in size
        self.rows_per_batch, self.max_batch_seconds = batch_size, max_batch_seconds
        self.batches_per_step, self.seed = batches_per_step, seed
        self.full_window_share = full_window_share if encoder_window == "auto" else 0.0
        self.length_multiple_s = length_multiple_s
        self.same_length = same_length and encoder_window == "auto"  # at the full window all are of one length
        durations_s = np.asarray(durations_s, dtype=np.float64)
        if encoder_window == "full":
            self.tail_s, self.lengths_s = (0.0, 0.0), np.full(len(durations_s), float(window_s))
            self.sort_by = durations_s  # the labels, too, are of like length then
        else:
            self.tail_s = (TAIL_S, TAIL_S) if same_length else tail_s
            self.lengths_s = self.sort_by = durations_s
            if same_length:
                self.sort_by = self._rounded(durations_s + TAIL_S)
        mean_s = np.minimum(self.lengths_s + sum(self.tail_s) / 2, window_s).mean()
        rows_per_step = (batch_size or max(1, max_batch_seconds // mean_s)) * batches_per_step
        self.pool_rows = int(rows_per_step * pool_steps)
        self.epoch = 0
        self.steps_per_epoch = max(1, sum(1 for _ in itertools.takewhile(lambda step: step[0] == 0, self._steps())))

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.steps_per_epoch * self.batches_per_step

    def __iter__(self):
        first = self.epoch * self.steps_per_epoch
        for _, padded_s, rows in itertools.islice(self._steps(), first, first + self.steps_per_epoch):
            for batch in np.array_split(rows, self.batches_per_step):
                yield [(row, padded_s) for row in batch.tolist()]

    def _steps(self):
        """Yields (number of the pass, padded seconds, the rows of all batches) of one step after the other."""
        waiting, num_steps = np.empty(0, int), 0
        phase = np.random.default_rng(self.seed).random()
        for number in itertools.count():
            generator = np.random.default_rng((self.seed, number))
            order = generator.permutation(len(self.lengths_s))
            pools = np.split(order, range(self.pool_rows, len(order), self.pool_rows))
            while pools or len(waiting):
                pool = pools.pop(0) if pools else np.empty(0, int)
                steps, waiting = self._cut(np.concatenate([waiting, pool]), with_short_steps=not pools)
                for place in generator.permutation(len(steps)):
                    rows = generator.permutation(steps[place])
                    padded_s = self._padded_s(rows, generator.uniform(*self.tail_s))
                    share = self.full_window_share
                    if math.floor((num_steps + 1) * share + phase) > math.floor(num_steps * share + phase):
                        # Seconds are counted for each batch, which has to fit in memory; rows for the step as a whole.
                        parts = self.batches_per_step if self.max_batch_seconds else 1
                        per_part = max(1, int(len(rows) / parts * padded_s / self.window_s))
                        rows, rest = np.split(rows, [per_part * parts])
                        waiting, padded_s = np.concatenate([waiting, rest]), self.window_s
                    num_steps += 1
                    yield number, padded_s, rows

    def _cut(self, rows, with_short_steps):
        """Cuts rows, the longest first, into steps; returns these and the rows that are left."""
        rows = rows[np.argsort(-self.sort_by[rows], kind="stable")]
        steps, rest, start = [], [], 0
        while start < len(rows):
            longest_s = self._padded_s(rows[start : start + 1], self.tail_s[1])
            size = (self.rows_per_batch or max(1, int(self.max_batch_seconds // longest_s))) * self.batches_per_step
            step = rows[start : start + size]
            if self.same_length:
                step = step[self.sort_by[step] == self.sort_by[step[0]]]
            start += len(step)
            (steps if len(step) == size or with_short_steps else rest).append(step)
        return steps, np.concatenate([*rest, np.empty(0, int)])

    def _padded_s(self, rows, tail_s):
        return float(self._rounded(self.lengths_s[rows].max() + tail_s))

    def _rounded(self, seconds):
        if self.length_multiple_s:
            seconds = np.ceil(seconds / self.length_multiple_s) * self.length_multiple_s
        return np.minimum(seconds, self.window_s)


class LongestFirstSampler(torch.utils.data.Sampler):
    """Draws batches for evaluation, the longest rows first: the least padding, and memory runs out at once or never.

    Yields lists of (row number, seconds to pad the waveform to).

    Args:
        durations_s: list of float, seconds of each row.
        window_s: seconds of the model's window.
        batch_size: rows in a batch that fills the window.
        encoder_window: `full` pads every row to the window; `auto` to its own length and a tail, and puts as many
            rows into a batch as make the padded seconds of `batch_size` windows.
    """

    def __init__(self, durations_s, window_s, batch_size, encoder_window="full"):
        self.batch_size = None
        self.batches = []
        order = sorted(range(len(durations_s)), key=lambda i: -durations_s[i])
        while order:
            padded_s = window_s if encoder_window == "full" else min(durations_s[order[0]] + TAIL_S, window_s)
            size = min(int(batch_size * window_s / padded_s), MOST_EVAL_ROWS * batch_size)
            self.batches.append([(row, padded_s) for row in order[:size]])
            order = order[size:]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class StreamLength:
    """Says for each row of a stream how far its batch is padded; see `LengthBatchSampler` for the settings.

    A batch is as long as its longest row, so one row in `batch_size` times `1 / full_window_share` fills the window.
    """

    def __init__(self, window_s, batch_size, full_window_share, seed):
        self.window_s, self.batch_size, self.share, self.seed = window_s, batch_size, full_window_share, seed

    def __call__(self, row):
        generator = np.random.default_rng((self.seed, row["epoch"], row["index"]))
        if generator.random() < self.share / self.batch_size:
            return {**row, "padded_s": float(self.window_s)}
        return {**row, "padded_s": min(row["duration_s"] + generator.uniform(*TRAIN_TAIL_S), self.window_s)}
