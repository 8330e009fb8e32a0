"""From decoded rows to batches: log-mel features and labels made when they are needed, in batches of like length."""

import torch


class WhisperCollator:
    """Turns decoded rows into one batch for Whisper; runs in the dataloader's workers and writes nothing to disk.

    Args:
        processor: `WhisperProcessor` whose tokenizer is set to the language, task and timestamps.
        on_bad_audio: `error` or `skip`; the trainer reads it when a batch reports a row that could not be decoded.

    Calling it with a list of rows (dicts with `index`, `waveform` float32 at the processor's sampling rate or None,
    `text`, `duration_s`, `bad_audio`) returns a dict:
        input_features: (batch, num_mel_bins, frames) float32, the waveform padded with silence to the whole window.
        labels: (batch, tokens) int64, right-padded with -100, without the leading start token, which Whisper adds.
        index: list of int, the rows' places in their dataset.
        duration_s: list of float, seconds of audio before padding.
        bad_audio: list of str, a sentence for every row left out of this batch.
    """

    def __init__(self, processor, on_bad_audio="error"):
        self.processor = processor
        self.on_bad_audio = on_bad_audio
        self._last_good = None

    def __call__(self, rows):
        bad = [row["bad_audio"] for row in rows if row["waveform"] is None]
        good = [row for row in rows if row["waveform"] is not None]
        if good:
            self._last_good = good[0]
        batch = {
            "index": [row.get("index") for row in good],
            "duration_s": [row["duration_s"] for row in good],
            "bad_audio": bad,
        }
        # Every process must take part in every step, so a batch with no good row repeats an earlier one.
        rows = good or ([self._last_good] if self._last_good else [])
        if rows:
            batch["input_features"] = self.features([row["waveform"] for row in rows])
            batch["labels"] = self.labels([row["text"] for row in rows], [row["duration_s"] for row in rows])
        return batch

    def features(self, waveforms):
        """Returns the log-mel features of a list of 16 kHz waveforms, (batch, num_mel_bins, frames) float32."""
        extractor = self.processor.feature_extractor
        return extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features

    def labels(self, texts, durations_s):
        """Returns the target tokens of a list of texts, (batch, tokens) int64 padded with -100."""
        tokenizer = self.processor.tokenizer
        ids = [label_ids(tokenizer, text, duration_s) for text, duration_s in zip(texts, durations_s)]
        labels = torch.full((len(ids), max(map(len, ids))), -100)
        for row, tokens in enumerate(ids):
            labels[row, : len(tokens)] = torch.tensor(tokens)
        return labels


def label_ids(tokenizer, text, duration_s):
    """Returns the tokens that Whisper learns to write for one text: prefix, text, end; without the start token.

    With timestamps on (`tokenizer.predict_timestamps`), a text that has none gets the start and end of its recording.
    """
    if tokenizer.predict_timestamps and not text.startswith("<|"):
        end = min(round(duration_s / 0.02) * 0.02, 30.0)
        text = f"<|0.00|>{text if text.startswith(' ') else ' ' + text}<|{end:.2f}|>"
    ids = tokenizer(text).input_ids
    # The model shifts the labels right and puts decoder_start_token_id in front, so a second one must not stay here.
    # (bos_token_id is another token, <|endoftext|>.)
    if ids[0] == tokenizer.convert_tokens_to_ids("<|startoftranscript|>"):
        ids = ids[1:]
    return ids


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
