"""Batches: labels as Whisper wants them, bad rows reported, rows of like length together."""

import numpy as np
import pytest
import torch
from conftest import NANO
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from hfspeech.batching import LengthBucketSampler, LongestFirstSampler, WhisperCollator
from hfspeech.text import label_ids

END = "<|endoftext|>"


def processor(timestamps=False, task="transcribe"):
    processor = WhisperProcessor.from_pretrained(NANO)
    processor.tokenizer.set_prefix_tokens(language="en", task=task, predict_timestamps=timestamps)
    return processor


def row(index, duration_s=1.0, text="four two", bad=None):
    waveform = None if bad else np.random.default_rng(index).normal(0, 0.1, int(16000 * duration_s)).astype(np.float32)
    known = {"index": index, "row": index + 1, "id": f"{index}.wav", "text": text, "duration_s": duration_s}
    return known | {"waveform": waveform} | ({"bad_audio": bad} if bad else {})


# Labels


def test_labels_hold_prefix_text_and_end_but_no_start():
    tokenizer = processor().tokenizer
    tokens = tokenizer.convert_ids_to_tokens(label_ids(tokenizer, "four two", 1.0))
    assert tokens[:3] == ["<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokens[-1] == END and tokens.count(END) == 1
    assert "<|startoftranscript|>" not in tokens


def test_the_model_reads_one_start_token():
    collator = WhisperCollator(processor())
    labels = collator.labels(["four", "nine nine nine"], [1.0, 1.0])
    config = WhisperForConditionalGeneration.from_pretrained(NANO).config
    read = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    assert (read[:, 0] == config.decoder_start_token_id).all()
    assert (read == config.decoder_start_token_id).sum(dim=1).tolist() == [1, 1]


def test_labels_are_padded_and_decode_back():
    nano = processor()
    texts = ["four", "nine eight seven six", "zero one"]
    labels = WhisperCollator(nano).labels(texts, [1.0] * 3)
    lengths = [len(label_ids(nano.tokenizer, text, 1.0)) for text in texts]
    assert labels.shape == (3, max(lengths)) and labels.dtype == torch.int64
    for tokens, length, text in zip(labels, lengths, texts):
        assert (tokens[length:] == -100).all() and (tokens[:length] != -100).all()
        assert tokens[length - 1] == nano.tokenizer.eos_token_id
        assert nano.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip() == text


def test_timestamps_are_the_recording_s_bounds():
    tokenizer = processor(timestamps=True).tokenizer
    tokens = tokenizer.convert_ids_to_tokens(label_ids(tokenizer, "four two", 1.234))
    assert tokens[:3] == ["<|en|>", "<|transcribe|>", "<|0.00|>"]
    assert tokens[-2:] == ["<|1.24|>", END]
    assert "<|notimestamps|>" not in tokens


def test_the_last_timestamp_is_the_tokenizer_s_last():
    tokenizer = processor(timestamps=True).tokenizer
    tokens = tokenizer.convert_ids_to_tokens(label_ids(tokenizer, "four two", 5.07))
    assert tokens[-2:] == ["<|5.00|>", END]


def test_timestamps_that_are_given_are_kept():
    tokenizer = processor(timestamps=True).tokenizer
    tokens = tokenizer.convert_ids_to_tokens(label_ids(tokenizer, "<|0.20|> four<|0.60|><|0.80|> two<|1.00|>", 3.0))
    stamps = [token for token in tokens if token[2:3].isdigit()]
    assert stamps == ["<|0.20|>", "<|0.60|>", "<|0.80|>", "<|1.00|>"]


# Collator


def test_a_batch_holds_the_whole_window():
    nano = processor()
    batch = WhisperCollator(nano)([row(3, 0.5), row(1, 1.5, "nine")])
    frames = nano.feature_extractor.nb_max_frames
    assert batch["input_features"].shape == (2, 80, frames) and batch["input_features"].dtype == torch.float32
    assert batch["index"] == [3, 1] and batch["duration_s"] == [0.5, 1.5] and batch["bad_audio"] == []


def test_features_do_not_depend_on_the_other_rows():
    collator = WhisperCollator(processor())
    alone = collator([row(1)])["input_features"][0]
    together = collator([row(2, 2.0), row(1)])["input_features"][1]
    torch.testing.assert_close(alone, together)


def test_a_bad_row_is_left_out_and_reported():
    batch = WhisperCollator(processor(), "skip")([row(0), row(1, bad="row 2, x.wav: 0 samples"), row(2, text="one")])
    assert batch["index"] == [0, 2] and batch["bad_audio"] == ["row 2, x.wav: 0 samples"]
    assert len(batch["input_features"]) == len(batch["labels"]) == len(batch["duration_s"]) == 2


def test_a_batch_without_a_good_row_has_nothing_to_learn():
    bad = ["row 8: broken", "row 9: broken"]
    batch = WhisperCollator(processor(), "skip")([row(8, bad=bad[0]), row(9, bad=bad[1])])
    assert batch["index"] == [] and batch["duration_s"] == [] and batch["bad_audio"] == bad
    assert batch["input_features"].shape == (1, 80, processor().feature_extractor.nb_max_frames)
    assert batch["labels"].tolist() == [[-100]] and batch["labels"].dtype == torch.int64


def test_what_has_to_stop_the_run_is_handed_on():
    batch = WhisperCollator(processor(), "skip")([row(0), {"waveform": None, "fatal": "M4A audio needs FFmpeg."}])
    assert batch["fatal"] == ["M4A audio needs FFmpeg."] and batch["bad_audio"] == [] and batch["index"] == [0]


def test_a_recording_longer_than_the_window_is_reported_and_not_cut_off():
    batch = WhisperCollator(processor())([row(0, 9.0), row(1, 5.05), row(2, 5.0)])
    assert batch["index"] == [1, 2] and batch["fatal"] == []
    assert batch["bad_audio"] == ["row 1, 0.wav: lasts 9.0 s, longer than the model's window of 5 s"]


def test_a_collator_survives_the_way_into_a_worker():
    loader = torch.utils.data.DataLoader(
        [row(i) for i in range(4)], batch_size=2, num_workers=1, collate_fn=WhisperCollator(processor()),
        multiprocessing_context="fork",
    )  # fmt: skip
    assert [batch["index"] for batch in loader] == [[0, 1], [2, 3]]


# Order

LENGTHS = np.random.default_rng(0).gamma(2.0, 2.0, 403).tolist()


def order(seed=0, epoch=0, batch_size=8, lengths=LENGTHS, **options):
    sampler = LengthBucketSampler(lengths, batch_size, seed, **options)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def padding(order, batch_size=8, lengths=LENGTHS):
    batches = [[lengths[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


@pytest.mark.parametrize("num_rows, batch_size", [(403, 8), (16, 8), (5, 8), (8, 8), (1, 1)])
def test_every_row_is_drawn_once(num_rows, batch_size):
    assert sorted(order(batch_size=batch_size, lengths=LENGTHS[:num_rows])) == list(range(num_rows))


def test_the_order_depends_on_seed_and_epoch_only():
    assert order(seed=3, epoch=2) == order(seed=3, epoch=2)
    orders = [tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)


def test_iterating_twice_in_one_epoch_repeats_the_order():
    sampler = LengthBucketSampler(LENGTHS, 8)
    assert list(sampler) == list(sampler)


def test_batches_are_of_like_length():
    random = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    assert padding(order()) < 0.2 * padding(random)


def test_batches_are_not_in_order_of_length():
    means = [np.mean([LENGTHS[i] for i in order()[at : at + 8]]) for at in range(0, 400, 8)]
    steps = np.sign(np.diff(means))
    assert 10 < (steps > 0).sum() < 40


def test_small_pools_trade_padding_for_randomness():
    assert padding(order(pool_batches=50)) < padding(order(pool_batches=2))


def test_the_short_batch_is_last():
    # Were it elsewhere, all batches after it would straddle two buckets: padding tells.
    for epoch in range(5):
        drawn = order(epoch=epoch, pool_batches=100)
        spans = [np.ptp([LENGTHS[i] for i in drawn[at : at + 8]]) for at in range(0, 403, 8)]
        assert np.median(spans) < 0.3
        assert sorted(LENGTHS)[:3] == sorted(LENGTHS[i] for i in drawn[-3:])


def test_longest_first():
    drawn = list(LongestFirstSampler(LENGTHS))
    assert sorted(drawn) == list(range(len(LENGTHS))) and len(LongestFirstSampler(LENGTHS)) == len(LENGTHS)
    assert [LENGTHS[i] for i in drawn] == sorted(LENGTHS, reverse=True)
    assert padding(drawn) <= padding(order())
