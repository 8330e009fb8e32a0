"""From decoded rows to batches: log-mel features and labels made when they are needed, in batches of like length."""

import numpy as np
import torch

from .text import labels_of

# A recording may outlast the model's window by this much, which is cut off: its times are rounded somewhere.
CUT_SLACK_S = 0.1


class WhisperCollator:
    """Turns decoded rows into one batch for Whisper; runs in the dataloader's workers and writes nothing to disk.

    Args:
        processor: `WhisperProcessor` whose tokenizer is set to the language, task and timestamps.
        on_bad_audio: `error` or `skip`; the trainer reads it when a batch reports a row that could not be decoded.

    Calling it with a list of rows (dicts with `index`, `row`, `id`, `waveform` float32 at the processor's sampling rate
    or None, `text`, `duration_s`; where `waveform` is None `bad_audio` or `fatal` says why; rows of a stream also
    have `left_out`) returns a dict:
        input_features: (batch, num_mel_bins, frames) float32, the waveform padded with silence to the whole window.
        labels: (batch, tokens) int64, right-padded with -100, without the leading start token, which Whisper adds.
        index: list of int, the rows' places in their dataset.
        duration_s: list of float, seconds of audio before padding.
        bad_audio: list of str, a sentence for every row left out of this batch.
        left_out: list of [reason, row, detail], the rows of a stream that its filters rejected.
        fatal: list of str, the faults that have to stop the run.
    A batch without a good row has a short silence for features and nothing but -100 for labels: every process must
    take part in every step.
    """

    def __init__(self, processor, on_bad_audio="error"):
        self.processor = processor
        self.on_bad_audio = on_bad_audio

    def __call__(self, rows):
        bad_audio = [row["bad_audio"] for row in rows if row.get("bad_audio")]
        good = []
        for row in rows:
            if row["waveform"] is not None:
                too_long = self._too_long(row)
                bad_audio += too_long
                good += [] if too_long else [row]
        return {
            "input_features": self.features([row["waveform"] for row in good] or [np.zeros(1600, np.float32)]),
            "labels": self.labels([row["text"] for row in good], [row["duration_s"] for row in good])
            if good
            else torch.full((1, 1), -100),
            "index": [row.get("index") for row in good],
            "duration_s": [row["duration_s"] for row in good],
            "bad_audio": bad_audio,
            "left_out": [entry for row in rows for entry in row.get("left_out") or []],
            "fatal": [row["fatal"] for row in rows if row.get("fatal")],
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

    def features(self, waveforms):
        """Returns the log-mel features of a list of 16 kHz waveforms, (batch, num_mel_bins, frames) float32."""
        extractor = self.processor.feature_extractor
        return extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features

    def labels(self, texts, durations_s):
        """Returns the target tokens of a list of texts, (batch, tokens) int64 padded with -100."""
        ids = labels_of(self.processor.tokenizer, texts, durations_s)
        labels = torch.full((len(ids), max(map(len, ids))), -100)
        for row, tokens in enumerate(ids):
            labels[row, : len(tokens)] = torch.tensor(tokens)
        return labels


class LengthBucketSampler(torch.utils.data.Sampler):
    """Draws rows in random order, but so that the rows of one batch, and of all processes' batches, are of like length.

    The rows are shuffled, cut into pools of `pool_batches` global batches, sorted by length inside each pool, and the
    global batches then drawn in random order. The order depends on the seed and the epoch only.

    Args:
        lengths: list of float, a length for each row in any unit.
        batch_size: rows in one global batch, over all processes.
        seed: int.
        pool_batches: global batches in one pool; more means less padding and less randomness.
    """

    def __init__(self, lengths, batch_size, seed=0, pool_batches=50):
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_batches = pool_batches
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        pools = order.split(self.batch_size * self.pool_batches)
        batches = [
            b for pool in pools for b in pool[self.lengths[pool].argsort(descending=True)].split(self.batch_size)
        ]
        # A short batch, if there is one, stays last, so that every other batch keeps its rows together.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        drawn = [batches[i] for i in torch.randperm(len(batches), generator=generator)] + last
        return iter(torch.cat(drawn).tolist())


class LongestFirstSampler(torch.utils.data.Sampler):
    """Draws every row once, the longest first: the least padding, and memory runs out at once or never."""

    def __init__(self, lengths):
        self.order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        return iter(self.order)
