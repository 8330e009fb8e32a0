"""Runs held against each other: a test that is right when there is no difference and finds one when there is."""

import json

import numpy as np
import pytest

from hfspeech.cli import main
from hfspeech.comparison import as_text, compare
from hfspeech.errors import UserError
from hfspeech.metrics import paired_difference, paired_ratios, score

DIGITS = "zero one two three four five six seven eight nine".split()


def paired_counts(rng, rows, rate_a, rate_b, speakers=None):
    """Word errors and words of two systems on the same rows, some of which (or whose speakers) are harder for both."""
    words = rng.integers(3, 12, rows)
    hard = rng.gamma(4, 1 / 4, rows if speakers is None else max(speakers) + 1)
    hard = hard if speakers is None else hard[speakers]
    a, b = (rng.binomial(words, np.minimum(1, rate * hard)) for rate in (rate_a, rate_b))
    return np.stack([a, words, b, words], axis=1)


@pytest.mark.parametrize("rows, num_speakers", [(60, None), (200, 25)])
def test_p_values_are_uniform_where_there_is_no_difference(rows, num_speakers):
    rng, tests = np.random.default_rng(0), 400
    speakers = None if num_speakers is None else np.arange(rows) % num_speakers
    p_values = np.sort([
        paired_ratios(paired_counts(rng, rows, 0.15, 0.15, speakers), speakers, 500, seed)["p_value"]
        for seed in range(tests)
    ])  # fmt: skip
    # 1.63 / sqrt(n) is the Kolmogorov-Smirnov distance that uniform draws exceed in 1 % of the cases.
    assert np.abs(p_values - (np.arange(tests) + 0.5) / tests).max() < 1.63 / tests**0.5
    assert 0.02 < (p_values <= 0.05).mean() < 0.085


def test_a_difference_is_found_and_a_larger_one_more_often():
    rng, tests = np.random.default_rng(1), 60
    found = [
        np.mean([paired_ratios(paired_counts(rng, 150, 0.10, rate), None, 300, seed)["p_value"] <= 0.05
                 for seed in range(tests)])
        for rate in (0.11, 0.13, 0.16)
    ]  # fmt: skip
    assert found[0] < found[1] < found[2] and found[2] > 0.9


def test_a_p_value_by_hand():
    """Two rows in which A is better: in no resample is it worse, and there is no p-value of 0."""
    result = paired_difference(["a b", "c d"], ["a x", "x x"], ["a b", "c d"], num_resamples=999)
    assert result["p_value"] == 2 / 1000
    assert paired_difference(["a b", "x d"], ["a b", "x d"], ["a b", "c d"])["p_value"] == 1
    turned = paired_difference(["a x", "x x"], ["a b", "c d"], ["a b", "c d"], num_resamples=999)
    assert (turned["difference"], turned["p_value"]) == (3 / 4, 2 / 1000)


def test_a_difference_of_characters():
    found = paired_difference(["abcx", "abcd"], ["abxx", "abcd"], ["abcd", "abcd"], metric="cer")
    assert found["difference"] == pytest.approx(-1 / 8)


def write_run(folder, said, seed=42, name="r", measures=None):
    """Writes record and predictions as a run leaves them; `said` is (reference, what was said) of each row."""
    folder.mkdir()
    rows = []
    for number, (text, after) in enumerate(said):
        row = {"set": "test", "index": number, "id": f"{name}{number}", "text": text, "speaker": f"s{number % 8}"}
        rows.append({**row, "after": after, **{k: values[number] for k, values in (measures or {}).items()}})
    texts, predictions, speakers = zip(*((row["text"], row["after"], row["speaker"]) for row in rows))
    record = {
        "arguments": {"seed": seed, "learning_rate": 1e-3, "output_dir": str(folder)},
        "environment": {"processes": 1},
        "after": score(predictions, texts, speakers),
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sayings(rng, rows, rate, texts=None):
    texts = texts or [" ".join(rng.choice(DIGITS, 5)) for _ in range(rows)]
    return [(text, " ".join("x" if rng.random() < rate else word for word in text.split())) for text in texts]


@pytest.fixture
def runs(tmp_path):
    """A run, a better one of another seed, and a third that has ten rows more and lacks five."""
    rng = np.random.default_rng(0)
    one = sayings(rng, 120, 0.3)
    texts = [text for text, _ in one]
    write_run(tmp_path / "one", one)
    write_run(tmp_path / "two", sayings(rng, 120, 0.1, texts), seed=43)
    write_run(tmp_path / "three", sayings(rng, 125, 0.3, texts[:115] + [f"new {i}" for i in range(10)]))
    return tmp_path


def test_runs_are_compared_on_the_rows_that_both_have(runs):
    result = compare([runs / "one", runs / "two", runs / "three"])
    two, three = result["tests"]
    assert (two["run"], two["against"], two["rows"], two["left_out"]) == ("B", "A", 120, 0)
    assert two["interval"] == "bootstrap over 8 speakers"
    assert two["high"] < 0 and two["p_value"] < 0.01
    rates = [json.loads((runs / name / "run.json").read_text())["after"]["wer"] for name in ("one", "two")]
    assert two["difference"] == pytest.approx(rates[1] - rates[0])
    assert (three["rows"], three["left_out"]) == (115, 15)
    assert result["settings"] == {"seed": [42, 43, 42]}
    assert any("15 rows" in note for note in result["notes"])


def test_what_is_printed_and_written(runs, capsys):
    output = runs / "out/comparison.json"
    assert main(["compare", str(runs / "one"), str(runs / "two"), "--metric", "cer", "--output", str(output)]) == 0
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    assert result["tests"][0]["measure"] == "cer" and as_text(result) in printed
    assert "seed     42  43" in printed and "B - A, test: CER" in printed and "points" in printed
    assert "learning_rate" not in printed


def test_records_without_rows_give_the_table_and_say_why(runs):
    (runs / "one/predictions.jsonl").unlink()
    result = compare([runs / "one" / "run.json", runs / "two"])
    assert result["tests"] == [] and "test: WER" in result["figures"]
    assert any("has no predictions.jsonl" in note for note in result["notes"])


def test_runs_without_a_row_in_common(runs, tmp_path):
    write_run(tmp_path / "other", [("a b", "a b"), ("c d", "c x")], name="other")
    result = compare([runs / "one", tmp_path / "other"])
    assert result["tests"] == [] and "A and B have no row of test in common: nothing to test." in result["notes"]


def test_measures_of_speech_are_compared_by_their_means(tmp_path):
    rng = np.random.default_rng(0)
    said = sayings(rng, 40, 0.2)
    mcd = rng.normal(5, 1, 40)
    write_run(tmp_path / "one", said, measures={"after_mcd": mcd.tolist()})
    write_run(
        tmp_path / "two", said, measures={"after_mcd": [None, *(mcd[1:] - 0.5)]}
    )  # one row could not be measured
    wer, distortion = compare([tmp_path / "one", tmp_path / "two"])["tests"]
    assert wer["difference"] == 0 and wer["p_value"] == 1
    assert distortion["measure"] == "mcd" and (distortion["rows"], distortion["left_out"]) == (39, 1)
    assert distortion["difference"] == pytest.approx(-0.5) and distortion["p_value"] < 0.01


def test_what_is_no_record(tmp_path):
    with pytest.raises(UserError, match="no record of a run in .*nowhere"):
        compare([tmp_path / "nowhere", tmp_path])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not the record of a run"):
        compare([tmp_path, tmp_path])
