"""Batches: labels as Whisper wants them, bad rows reported, no more padding than needed, no row lost."""

import collections
import itertools

import numpy as np
import pytest
import torch
from conftest import NANO
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from hfspeech.batching import (
    LENGTH_MULTIPLE_S,
    TAIL_S,
    TRAIN_TAIL_S,
    LengthBatchSampler,
    LongestFirstSampler,
    StreamLength,
    WhisperCollator,
)
from hfspeech.text import label_ids

END = "<|endoftext|>"


def processor(timestamps=False, task="transcribe"):
    processor = WhisperProcessor.from_pretrained(NANO)
    processor.tokenizer.set_prefix_tokens(language="en", task=task, predict_timestamps=timestamps)
    return processor


def row(index, duration_s=1.0, text="four two", bad=None, padded_s=None):
    waveform = None if bad else np.random.default_rng(index).normal(0, 0.1, int(16000 * duration_s)).astype(np.float32)
    known = {"index": index, "row": index + 1, "id": f"{index}.wav", "text": text, "duration_s": duration_s}
    known |= {"padded_s": padded_s}
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
    assert labels.shape == (3, -(-max(lengths) // 8) * 8) and labels.dtype == torch.int64
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


def test_a_batch_holds_the_whole_window_unless_its_rows_say_how_far_to_pad():
    nano = processor()
    batch = WhisperCollator(nano)([row(3, 0.5), row(1, 1.5, "nine", padded_s=2.0)])
    frames = nano.feature_extractor.nb_max_frames
    assert batch["input_features"].shape == (2, 80, frames) and batch["input_features"].dtype == torch.float32
    assert batch["index"] == [3, 1] and batch["duration_s"] == [0.5, 1.5] and batch["bad_audio"] == []
    assert batch["padded_s"] == 5.0 and batch["is_encoded"] == [False, False]


def test_a_batch_is_padded_to_the_longest_that_its_rows_ask_for():
    batch = WhisperCollator(processor())([row(3, 0.5, padded_s=1.0), row(1, 1.5, padded_s=2.0)])
    assert batch["input_features"].shape == (2, 80, 112)  # a frame lasts 20 ms: 2 s rounded up to 7 times 0.32
    assert batch["padded_s"] == 2.0


@pytest.mark.parametrize("duration_s", [0.3, 1.0, 1.2345, 3.3333])
@pytest.mark.parametrize("tail_s", [0.0125, 0.2, 1.0])  # 200 samples, and the ends of what is drawn in training
def test_the_frames_of_an_unpadded_recording_are_those_of_the_padded_one(duration_s, tail_s):
    """Speech is not seen otherwise: Whisper scales by the loudest moment, and the rest is silence in both."""
    collator = WhisperCollator(processor())
    waveform = row(1, duration_s)["waveform"]
    full = collator.features([waveform])
    short = collator.features([waveform], duration_s + tail_s)
    assert full.shape[-1] == 250 and short.shape[-1] % 2 == 0
    seconds = short.shape[-1] * 0.02
    assert duration_s + max(tail_s, 0.2) <= seconds + 1e-4 < duration_s + max(tail_s, 0.2) + LENGTH_MULTIPLE_S + 1e-3
    assert short.shape[-1] % round(LENGTH_MULTIPLE_S / 0.02) == 0
    torch.testing.assert_close(short, full[..., : short.shape[-1]])


@pytest.mark.parametrize("padded_s", [4.7, 4.99, 5.0, 5.5, 9.0])
def test_features_never_outgrow_the_window(padded_s):
    frames = WhisperCollator(processor()).features([row(1, 4.6)["waveform"]], padded_s).shape[-1]
    assert frames % 2 == 0 and 240 <= frames <= 250 and (padded_s < 5.0 or frames == 250)


def test_a_recording_that_augmentation_made_longer_than_planned_keeps_its_tail():
    collator = WhisperCollator(processor())
    waveform = row(1, 2.0)["waveform"]
    short = collator.features([waveform], 1.7)
    assert short.shape[-1] * 0.02 >= 2.0 + TRAIN_TAIL_S[0]
    torch.testing.assert_close(short, collator.features([waveform])[..., : short.shape[-1]])


def test_rows_that_are_encoded_already_need_no_features():
    collator = WhisperCollator(processor())
    known = {**row(4, 1.3, "nine", padded_s=2.0), "waveform": None, "is_encoded": True}
    mixed = collator([known, row(1, 1.5, "four", padded_s=2.0)])
    assert mixed["is_encoded"] == [True, False] and mixed["index"] == [4, 1] and len(mixed["labels"]) == 2
    assert mixed["input_features"].shape == (1, 80, 112)
    alone = collator([known])
    assert "input_features" not in alone and alone["padded_s"] == 2.0 and alone["duration_s"] == [1.3]
    assert alone["bad_audio"] == []


def test_labels_can_be_rounded_up_to_few_lengths():
    collator = WhisperCollator(processor())
    collator.pad_labels_to_multiple_of = 16
    labels = collator.labels(["four", "nine nine nine"], [1.0, 1.0])
    assert labels.shape == (2, 16) and (labels[:, -1] == -100).all()


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


# The order of training

WINDOW_S = 30.0
DURATIONS_S = np.random.default_rng(0).gamma(2.0, 2.0, 403).clip(0.3, 25.0).tolist()


def sampler(durations_s=DURATIONS_S, **settings):
    if "max_batch_seconds" not in settings:
        settings = {"batch_size": 8, **settings}
    return LengthBatchSampler(durations_s, WINDOW_S, **settings)


def drawn(sampler, num_epochs=1):
    """Returns the batches of so many epochs, each as (rows, padded seconds), having checked that the latter agree."""
    batches = []
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        for batch in found:
            assert len({padded_s for _, padded_s in batch}) <= 1
            batches.append(([row for row, _ in batch], batch[0][1] if batch else None))
    return batches


def drawn_steps(sampler, num_steps):
    """Returns so many steps, over as many epochs as that takes, each a list of batches."""
    epochs = -(-num_steps // sampler.steps_per_epoch)
    batches = drawn(sampler, epochs)
    per_step = sampler.batches_per_step
    return [batches[at : at + per_step] for at in range(0, len(batches), per_step)][:num_steps]


def padding(batches, durations_s=DURATIONS_S):
    batches = [[durations_s[i] for i in rows] for rows, _ in batches]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


EVERY_KIND = [
    {"batch_size": 8},
    {"batch_size": 5, "batches_per_step": 4},
    {"batch_size": 8, "full_window_share": 0.25},
    {"batch_size": 8, "encoder_window": "full"},
    {"batch_size": 8, "length_multiple_s": WINDOW_S / 16},
    {"batch_size": 8, "pool_steps": 3},
    {"max_batch_seconds": 60.0},
    {"max_batch_seconds": 60.0, "batches_per_step": 3, "full_window_share": 0.1},
]
SAME_LENGTH = {"batch_size": 4, "length_multiple_s": WINDOW_S / 32, "same_length": True}


def name_of(settings):
    return ",".join(f"{name}={value}" for name, value in settings.items())


@pytest.mark.parametrize("settings", EVERY_KIND, ids=name_of)
def test_no_row_is_lost_and_none_is_drawn_much_more_often_than_another(settings):
    few = DURATIONS_S[:99]  # no multiple of a step
    for num_epochs in (3, 9):
        times = collections.Counter(row for rows, _ in drawn(sampler(few, **settings), num_epochs) for row in rows)
        counts = [times[row] for row in range(len(few))]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 2, (num_epochs, sorted(counts))


def test_rows_that_meet_only_their_like_are_not_lost_either():
    times = collections.Counter(row for rows, _ in drawn(sampler(**SAME_LENGTH), 12) for row in rows)
    assert len(times) == len(DURATIONS_S)


@pytest.mark.parametrize("settings", EVERY_KIND, ids=name_of)
def test_an_epoch_is_about_one_pass(settings):
    num_rows = sum(len(rows) for rows, _ in drawn(sampler(**settings)))
    assert 0.9 * len(DURATIONS_S) <= num_rows <= 1.1 * len(DURATIONS_S)


def test_an_epoch_of_rows_that_meet_only_their_like_is_about_one_pass_too():
    num_rows = sum(len(rows) for rows, _ in drawn(sampler(**SAME_LENGTH, batches_per_step=4)))
    assert 0.7 * len(DURATIONS_S) <= num_rows <= 1.3 * len(DURATIONS_S)


@pytest.mark.parametrize(
    "settings", [*EVERY_KIND, SAME_LENGTH, {**SAME_LENGTH, "full_window_share": 0.1}], ids=name_of
)
def test_the_batches_of_a_step_cost_the_same_and_hold_their_rows_with_a_tail(settings):
    for step in drawn_steps(sampler(**settings), 60):
        padded_s = step[0][1]
        assert {seconds for rows, seconds in step if rows} == {padded_s}
        sizes = [len(rows) for rows, _ in step]
        assert sizes[0] >= 1 and max(sizes) - min(sizes) <= 1  # all are as large, but in a short step
        longest_s = max(DURATIONS_S[row] for rows, _ in step for row in rows)
        assert padded_s == WINDOW_S or padded_s >= longest_s + 0.2


@pytest.mark.parametrize("batches_per_step", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("max_batch_seconds", [20.0, 37.5, 240.0])
def test_no_batch_lasts_longer_than_it_may(batches_per_step, share, max_batch_seconds):
    settings = {"max_batch_seconds": max_batch_seconds, "batches_per_step": batches_per_step}
    batches = drawn(sampler(**settings, full_window_share=share), 3)
    costs = [len(rows) * (padded_s or 0) for rows, padded_s in batches]
    assert all(cost <= max_batch_seconds or len(rows) == 1 for cost, (rows, _) in zip(costs, batches))
    if share == 0 and max_batch_seconds == 240.0:
        assert np.mean(costs) > 0.8 * max_batch_seconds  # and it is made use of


def test_a_single_row_longer_than_a_batch_may_be_is_drawn_by_itself():
    batches = drawn(sampler([20.0, 1.0, 1.0, 1.0], max_batch_seconds=10.0), 6)
    assert {len(rows) for rows, _ in batches if 0 in rows} == {1}
    assert all(len(rows) * padded_s <= 10 for rows, padded_s in batches if 0 not in rows)


@pytest.mark.parametrize("settings", EVERY_KIND, ids=name_of)
def test_the_order_depends_on_seed_and_epoch_only(settings):
    def orders():
        found = {}
        for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
            one = sampler(**settings, seed=seed)
            one.set_epoch(epoch)
            found[seed, epoch] = tuple(map(tuple, one))
            assert tuple(map(tuple, one)) == found[seed, epoch]  # again in the same epoch
        return found

    first = orders()
    assert first == orders()
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.02, 4), (0.05, 10), (0.1, 20), (1.0, 200)])
@pytest.mark.parametrize(
    "settings", [{"batch_size": 8}, {"max_batch_seconds": 60.0, "batches_per_step": 2}], ids=name_of
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_full_windows_is_exact_over_all_epochs(share, expected, settings, seed):
    """No duration comes near the window, so only a step that is meant to fill it does."""
    steps = drawn_steps(sampler(**settings, full_window_share=share, seed=seed), 200)
    full = [at for at, step in enumerate(steps) if step[0][1] == WINDOW_S]
    assert len(full) == expected
    if 1 < len(full) < 200:
        assert set(np.diff(full)) == {round(1 / share)}  # evenly spread


def test_full_windows_are_not_in_the_same_place_for_every_seed():
    places = set()
    for seed in range(8):
        steps = drawn_steps(sampler(full_window_share=0.1, seed=seed), 12)
        places.add(next(at for at, step in enumerate(steps) if step[0][1] == WINDOW_S))
    assert len(places) > 2


@pytest.mark.parametrize("batches_per_step", [1, 4])
def test_a_full_window_step_costs_no_more_than_the_step_that_it_was(batches_per_step):
    """Up to its first full window a sampler draws what it would draw without any."""
    fewer = 0
    for seed in range(20):
        settings = {"batch_size": 8, "batches_per_step": batches_per_step, "seed": seed}
        plain = drawn_steps(sampler(**settings), 12)
        mixed = drawn_steps(sampler(**settings, full_window_share=0.1), 12)
        at = next(at for at, step in enumerate(mixed) if step[0][1] == WINDOW_S)
        assert mixed[:at] == plain[:at]
        was, left = ([row for rows, _ in steps[at] for row in rows] for steps in (plain, mixed))
        padded_s = plain[at][0][1]
        assert len(left) == 1 or len(left) * WINDOW_S <= len(was) * padded_s
        assert len(left) >= 1 and (len(left) + 1) * WINDOW_S > len(was) * padded_s
        assert set(left) <= set(was)
        fewer += len(left) < len(was)
    assert fewer == 20


@pytest.mark.parametrize("settings", [{}, {"full_window_share": 0.3}, {"length_multiple_s": WINDOW_S / 32, "same_length": True}], ids=name_of)
def test_the_steps_are_the_same_however_they_are_split_into_batches(settings):
    """Over passes whose last rows fill no step, and with steps of which only some rows are taken."""

    def rows_of_steps(batch_size, batches_per_step):
        split = {"batch_size": batch_size, "batches_per_step": batches_per_step}
        steps = drawn_steps(sampler(DURATIONS_S[:93], **split, **settings), 30)
        return [({row for rows, _ in step for row in rows}, step[0][1]) for step in steps]

    whole = rows_of_steps(16, 1)
    assert any(len(rows) < 16 for rows, _ in whole)
    assert whole == rows_of_steps(4, 4) == rows_of_steps(8, 2) == rows_of_steps(1, 16)


def test_a_row_among_its_like_is_always_padded_to_the_same_length():
    lengths = collections.defaultdict(set)
    for rows, padded_s in drawn(sampler(**SAME_LENGTH), 6):
        for row in rows:
            lengths[row].add(padded_s)
    assert all(len(found) == 1 for found in lengths.values())
    assert all(DURATIONS_S[row] + TAIL_S <= min(found) for row, found in lengths.items())


@pytest.mark.parametrize("num_lengths", [4, 16, 94])
def test_the_number_of_lengths_is_bounded(num_lengths):
    batches = drawn(sampler(length_multiple_s=WINDOW_S / num_lengths, full_window_share=0.05), 4)
    assert 1 < len({padded_s for _, padded_s in batches}) <= num_lengths


def test_without_a_bound_the_tail_is_drawn_anew_for_each_step():
    steps = drawn_steps(sampler(), 100)
    tails = [step[0][1] - max(DURATIONS_S[row] for rows, _ in step for row in rows) for step in steps]
    assert 0.2 <= min(tails) < 0.3 and 0.65 < max(tails) <= 0.7


def test_the_full_window_can_be_kept_for_every_step():
    batches = drawn(sampler(encoder_window="full", full_window_share=0.05), 2)
    assert {padded_s for _, padded_s in batches} == {WINDOW_S}
    assert np.median([len(rows) for rows, _ in batches]) == max(len(rows) for rows, _ in batches) == 8
    assert padding(batches) < 0.25 * padding(by_chance())  # labels are padded less where rows are of like length


@pytest.mark.parametrize("num_rows", [1, 3, 9])
@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 8}, {"batch_size": 2, "batches_per_step": 4}, {"max_batch_seconds": 200.0}, SAME_LENGTH],
    ids=name_of,
)
def test_few_rows_are_enough(num_rows, settings):
    small = sampler(DURATIONS_S[:num_rows], **settings, full_window_share=0.05)
    assert len(small) >= 1
    assert all(rows or at for step in drawn_steps(small, 40) for at, (rows, _) in enumerate(step))
    assert {row for rows, _ in drawn(small, 40) for row in rows} == set(range(num_rows))


def by_chance():
    """Batches of eight in an order that knows nothing of lengths."""
    order = np.random.default_rng(1).permutation(len(DURATIONS_S)).tolist()
    return [(order[at : at + 8], None) for at in range(0, len(order), 8)]


def test_batches_are_of_like_length():
    assert padding(drawn(sampler())) < 0.2 * padding(by_chance())


def test_batches_are_not_in_order_of_length():
    means = [np.mean([DURATIONS_S[i] for i in rows]) for rows, _ in drawn(sampler())]
    assert 10 < (np.sign(np.diff(means)) > 0).sum() < 40


def test_small_pools_trade_padding_for_randomness():
    assert padding(drawn(sampler(pool_steps=50))) < padding(drawn(sampler(pool_steps=2)))


# A stream


def test_the_rows_of_a_stream_say_how_far_to_pad_them():
    length = StreamLength(WINDOW_S, batch_size=8, full_window_share=0.1, seed=0)
    given = [{"index": i, "epoch": 0, "duration_s": seconds} for i, seconds in enumerate(DURATIONS_S * 5)]
    rows = [length(row) for row in given]
    assert rows == [length(row) for row in given]
    assert all(
        row["padded_s"] != length({**row, "epoch": 1})["padded_s"] for row in rows if row["padded_s"] < WINDOW_S
    )
    tails = [row["padded_s"] - row["duration_s"] for row in rows if row["padded_s"] < WINDOW_S]
    assert 0.2 <= min(tails) < 0.25 and 0.65 < max(tails) <= 0.7
    full = [any(row["padded_s"] == WINDOW_S for row in rows[at : at + 8]) for at in range(0, len(rows), 8)]
    assert np.mean(full) == pytest.approx(0.1, abs=0.04)
    none = StreamLength(WINDOW_S, batch_size=8, full_window_share=0.0, seed=0)
    assert all(none(row)["padded_s"] < WINDOW_S for row in rows)


def test_a_stream_s_row_as_long_as_the_window_is_padded_no_further():
    assert StreamLength(5.0, 8, 0.0, 0)({"index": 1, "epoch": 0, "duration_s": 4.9})["padded_s"] == 5.0


# The order of evaluation


@pytest.mark.parametrize("encoder_window", ["full", "auto"])
def test_evaluation_draws_each_row_once_and_the_longest_first(encoder_window):
    longest_first = LongestFirstSampler(DURATIONS_S, WINDOW_S, 8, encoder_window)
    batches = list(longest_first)
    assert len(batches) == len(longest_first) and batches == list(longest_first)
    order = [row for batch in batches for row, _ in batch]
    assert sorted(order) == list(range(len(DURATIONS_S)))
    assert [DURATIONS_S[i] for i in order] == sorted(DURATIONS_S, reverse=True)


def test_evaluation_at_the_full_window_counts_rows():
    batches = list(LongestFirstSampler(DURATIONS_S, WINDOW_S, 8, "full"))
    assert {len(batch) for batch in batches[:-1]} == {8} and 1 <= len(batches[-1]) <= 8
    assert {padded_s for batch in batches for _, padded_s in batch} == {WINDOW_S}


def test_unpadded_evaluation_puts_more_short_rows_together_at_no_more_cost():
    batches = list(LongestFirstSampler(DURATIONS_S, WINDOW_S, 8, "auto"))
    for batch in batches:
        padded_s = batch[0][1]
        assert {seconds for _, seconds in batch} == {padded_s}
        assert padded_s == pytest.approx(min(max(DURATIONS_S[row] for row, _ in batch) + TAIL_S, WINDOW_S))
        assert len(batch) * padded_s <= 8 * WINDOW_S and 1 <= len(batch) <= 64
    assert max(map(len, batches)) > 24


def test_very_short_rows_do_not_make_a_batch_without_bound():
    batches = list(LongestFirstSampler([0.1] * 200, WINDOW_S, 8, "auto"))
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
