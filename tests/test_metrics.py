"""Error rates against examples counted by hand, and intervals against simulations whose truth is known."""

import json

import jiwer
import numpy as np
import pytest

from hfspeech.errors import UserError
from hfspeech.metrics import (
    MIN_SPEAKERS,
    CharacterErrorRate,
    SpeechErrorRates,
    WordErrorRate,
    paired_difference,
    score,
)

# By hand: row 0 is right; row 1 has one substitution (c for x) and one deletion (d); row 2 one insertion (and).
REFERENCES = ["one two", "a b c d", "go home now"]
PREDICTIONS = ["one two", "a b x", "go and home now"]


@pytest.fixture
def word_error_rate(tmp_path):
    return WordErrorRate(cache_dir=tmp_path)


def simulate(rng, speaker_rates, rows_per_speaker, words_per_row=5):
    """Texts in which each word of a speaker is wrong with the speaker's own probability."""
    rates = np.asarray(speaker_rates)[:, None, None]
    wrong = rng.random((len(speaker_rates), rows_per_speaker, words_per_row)) < rates
    predictions = [" ".join("x" if w else "a" for w in row) for row in wrong.reshape(-1, words_per_row)]
    speakers = np.repeat(np.arange(len(speaker_rates)), rows_per_speaker).tolist()
    return predictions, [" ".join("a" * words_per_row)] * len(predictions), speakers


def test_word_error_rate_by_hand(word_error_rate):
    result = word_error_rate.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == {"wer": 3 / 9, "substitutions": 1, "insertions": 1, "deletions": 1, "hits": 7}


def test_character_error_rate_by_hand(tmp_path):
    result = CharacterErrorRate(cache_dir=tmp_path).compute(predictions=["abx", "a b"], references=["abcd", "a b"])
    assert result == {"cer": 2 / 7, "substitutions": 1, "insertions": 0, "deletions": 1, "hits": 5}


def test_batches_equal_one_call(word_error_rate):
    whole = word_error_rate.compute(predictions=PREDICTIONS, references=REFERENCES)
    word_error_rate.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    word_error_rate.add(prediction=PREDICTIONS[2], reference=REFERENCES[2])
    assert word_error_rate.compute() == whole


def test_rates_equal_jiwer_on_random_text(tmp_path):
    rng = np.random.default_rng(0)
    predictions, references = (
        [" ".join(rng.choice(list("abc"), size=rng.integers(1, 9))) for _ in range(50)] for _ in range(2)
    )
    words = WordErrorRate(cache_dir=tmp_path).compute(predictions=predictions, references=references)
    characters = CharacterErrorRate(cache_dir=tmp_path).compute(predictions=predictions, references=references)
    assert words["wer"] == pytest.approx(jiwer.wer(references, predictions))
    assert characters["cer"] == pytest.approx(jiwer.cer(references, predictions))
    result = score(predictions, references, normalizer="none")
    assert (result["wer"], result["cer"]) == (words["wer"], characters["cer"])


def test_metric_takes_a_normalizer(word_error_rate):
    texts = {"predictions": ["hello world"], "references": ["Hello, world!"]}
    assert word_error_rate.compute(**texts)["wer"] == 1
    assert word_error_rate.compute(**texts, normalizer="basic")["wer"] == 0


def test_insertions_on_empty_references_count(word_error_rate):
    result = word_error_rate.compute(predictions=["thank you", "a"], references=["", "a"])
    assert result == {"wer": 2.0, "substitutions": 0, "insertions": 2, "deletions": 0, "hits": 1}


@pytest.mark.parametrize("references", [["", " "], []])
def test_nothing_to_score_is_explained(word_error_rate, references):
    with pytest.raises(UserError, match="references"):
        word_error_rate.compute(predictions=["x"] * len(references), references=references)
    with pytest.raises(UserError, match="references"):
        score(["x"] * len(references), references)


def test_metric_can_be_used_again_after_an_error(word_error_rate):
    with pytest.raises(UserError):
        word_error_rate.compute(predictions=["x"], references=[""])
    assert word_error_rate.compute(predictions=["x"], references=["x"])["wer"] == 0


def test_score_by_hand():
    result = score(["HELLO world", "yes", "uh"], ["Hello, world!", "no", "[noise]"])
    assert {key: result[key] for key in ("substitutions", "insertions", "deletions", "hits", "words", "rows")} == {
        "substitutions": 1, "insertions": 1, "deletions": 0, "hits": 2, "words": 3, "rows": 3,
    }  # fmt: skip
    assert result["wer"] == 2 / 3
    assert result["raw_wer"] == 4 / 4
    assert result["cer"] == 5 / 13  # yes for no: 3 errors; uh for nothing: 2; 11 + 2 reference characters
    assert result["empty_references"] == 1
    assert result["normalizer"] == "basic"
    assert result["interval"] == "bootstrap over 3 rows"
    assert result["wer_low"] <= result["wer"] <= result["wer_high"]


def test_english_normalizer_turns_one_wrong_digit_into_a_wrong_string():
    predictions, references = ["four two five", "one"], ["four two nine", "one"]
    assert score(predictions, references, normalizer="basic")["wer"] == 1 / 4
    assert score(predictions, references, normalizer="english")["wer"] == 1 / 2


def test_marks_are_errors_only_for_the_normalizer_that_keeps_them():
    assert score(["คา"], ["ค่า"], normalizer="marks")["wer"] == 1
    assert score(["पानी"], ["पानि"], normalizer="marks")["wer"] == 1
    assert score(["पानी"], ["पानि"], normalizer="basic")["wer"] == 0


def test_any_function_normalizes_and_is_named():
    def vowels_only(text):
        return "".join(c for c in text if c in "aeiou")

    result = score(["bad"], ["cat"], normalizer=vowels_only)
    assert (result["wer"], result["normalizer"]) == (0, "vowels_only")


def test_groups_are_scored_apart():
    accents = ["north", "south", "south"]
    result = score(PREDICTIONS, REFERENCES, groups={"accent": accents, "device": ["phone", None, float("nan")]})
    north, south = result["groups"]["accent"]["north"], result["groups"]["accent"]["south"]
    assert (north["wer"], north["rows"], north["words"], north["wer_low"]) == (0, 1, 2, None)
    assert (south["wer"], south["rows"], south["words"]) == (3 / 7, 2, 7)
    assert (south["wer_low"], south["wer_high"]) == (1 / 3, 2 / 4)  # both rows are row 2, or both are row 1
    assert list(result["groups"]["device"]) == ["phone", "unknown"]
    json.dumps(result, allow_nan=False)


def test_group_without_reference_words_has_no_rate():
    group = score(["x", "a"], ["", "a"], groups={"kind": ["silence", "speech"]})["groups"]["kind"]["silence"]
    assert (group["wer"], group["wer_low"], group["cer"], group["words"], group["rows"]) == (None, None, None, 0, 1)


def test_batched_score_equals_score(tmp_path):
    metric = SpeechErrorRates(cache_dir=tmp_path)
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        metric.add_batch(predictions=[prediction], references=[reference])
    options = {"groups": {"accent": ["north", "south", "south"]}, "normalizer": "marks"}
    assert metric.compute(**options) == score(PREDICTIONS, REFERENCES, **options)


def test_interval_is_the_same_for_the_same_seed_only():
    texts = simulate(np.random.default_rng(0), np.linspace(0.1, 0.5, 20), rows_per_speaker=3)
    assert score(*texts, seed=1) == score(*texts, seed=1)
    assert score(*texts, seed=1)["wer_low"] != score(*texts, seed=2)["wer_low"]


@pytest.mark.parametrize(
    "speakers, expected",
    [
        (MIN_SPEAKERS, "bootstrap over 5 speakers"),
        (MIN_SPEAKERS - 1, "bootstrap over 20 rows"),
        ("one missing", "bootstrap over 20 rows"),
        (None, "bootstrap over 20 rows"),
    ],
)
def test_interval_names_what_it_resamples(speakers, expected):
    if isinstance(speakers, int):
        speakers = [row % speakers for row in range(20)]
    elif speakers:
        speakers = [row % 10 for row in range(19)] + [None]
    assert score(["a"] * 20, ["a"] * 20, speakers)["interval"] == expected


def test_clustered_errors_widen_the_interval():
    predictions, references, speakers = simulate(np.random.default_rng(0), [0.0, 0.8] * 5, rows_per_speaker=30)
    by_speaker, by_row = score(predictions, references, speakers), score(predictions, references)
    assert by_speaker["wer"] == by_row["wer"]
    assert by_speaker["wer_high"] - by_speaker["wer_low"] > 4 * (by_row["wer_high"] - by_row["wer_low"])


def test_interval_agrees_with_the_formula_for_independent_rows():
    predictions, references, _ = simulate(np.random.default_rng(0), [0.2], rows_per_speaker=800, words_per_row=1)
    result = score(predictions, references)
    width = 2 * 1.96 * np.sqrt(result["wer"] * (1 - result["wer"]) / 800)
    assert result["wer_high"] - result["wer_low"] == pytest.approx(width, rel=0.1)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held, trials = 0, 150
    for trial in range(trials):
        texts = simulate(rng, rng.beta(2, 6, size=30), rows_per_speaker=4)  # the mean of that distribution is 1/4
        result = score(*texts, normalizer="none", num_resamples=300, seed=trial, confidence=0.9)
        held += result["wer_low"] <= 0.25 <= result["wer_high"]
    assert 0.82 <= held / trials <= 0.97


def test_paired_difference_by_hand():
    result = paired_difference(["a b", "c d"], ["a x", "x x"], ["a b", "c d"])
    assert result["difference"] == -3 / 4
    assert (result["low"], result["high"]) == (-1, -1 / 2)
    assert result["p_a_better"] == 1
    assert result["interval"] == "bootstrap over 2 rows"


def test_paired_difference_of_equal_systems_is_zero():
    result = paired_difference(PREDICTIONS, PREDICTIONS, REFERENCES)
    assert (result["difference"], result["low"], result["high"], result["p_a_better"]) == (0, 0, 0, 0.5)


def test_paired_difference_turns_round_with_its_systems():
    rng = np.random.default_rng(0)
    a, references, speakers = simulate(rng, [0.2] * 8, rows_per_speaker=10)
    b = simulate(rng, [0.25] * 8, rows_per_speaker=10)[0]
    ab, ba = (paired_difference(*pair, references, speakers) for pair in ((a, b), (b, a)))
    assert ab["interval"] == "bootstrap over 8 speakers"
    assert (ab["difference"], ab["low"]) == (-ba["difference"], pytest.approx(-ba["high"]))
    assert ab["p_a_better"] == pytest.approx(1 - ba["p_a_better"])


def test_pairing_finds_what_two_intervals_hide():
    hard = np.linspace(0.05, 0.75, 12)
    b, references, speakers = simulate(np.random.default_rng(3), hard, rows_per_speaker=20)
    a = [text.replace("x", "a", 1) if row % 3 == 0 else text for row, text in enumerate(b)]
    alone_a, alone_b = score(a, references, speakers), score(b, references, speakers)
    assert alone_a["wer_high"] > alone_b["wer_low"]
    assert paired_difference(a, b, references, speakers)["high"] < 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(predictions=["a"], references=["a", "b"]), "2 references, but 1 in predictions"),
        (dict(predictions=["a"], references=["a"], speakers=["s", "t"]), "1 references, but 2 in speakers"),
        (dict(predictions=["a"], references=["a"], groups={"accent": []}), "1 references, but 0 in accent"),
        (dict(predictions=["a", "b"], references=["a", None]), "Row 1: the reference is None"),
        (dict(predictions=["a"], references=["a"], normalizer="bacis"), "Did you mean basic"),
        (dict(predictions=["a"], references=["a"], confidence=95), "confidence is 95"),
        (dict(predictions=["a"], references=["a"], num_resamples=0), "num_resamples is 0"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        score(**arguments)
