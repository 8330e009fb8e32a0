"""The speech that ships with the repository is what its dataset cards say, and its scripts still make it."""

import csv
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ASSETS = Path(__file__).parent.parent / "assets"
NUM_ROWS = {
    "espeak_digits": {"train": 600, "validation": 60, "test": 300},
    "flite_digits": {"train": 500, "validation": 60, "test": 160},
}
MAX_BYTES = {"espeak_digits": 3_000_000, "flite_digits": 5_000_000}
WORDS = set("zero one two three four five six seven eight nine".split())

each_set = pytest.mark.parametrize("name", NUM_ROWS)


def read_metadata(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def long_texts(folder):
    return {row["text"] for row in read_metadata(folder) if len(row["text"].split()) >= 3}


def make(name, output_dir, *flags):
    subprocess.run(
        [sys.executable, str(ASSETS / name / "make.py"), "--output_dir", str(output_dir), *flags],
        check=True,
        capture_output=True,
        timeout=120,
    )


@each_set
def test_folder_is_small(name):
    assert sum(path.stat().st_size for path in (ASSETS / name).rglob("*.*")) <= MAX_BYTES[name]


@each_set
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_metadata_names_the_files_that_are_there(name, split):
    rows = read_metadata(ASSETS / name / split)
    assert len(rows) == NUM_ROWS[name][split]
    assert sorted(row["file_name"] for row in rows) == sorted(
        path.name for path in (ASSETS / name / split).iterdir() if path.name != "metadata.csv"
    )
    assert all(set(row["text"].split()) <= WORDS and row["speaker"] for row in rows)


def test_no_text_of_three_digits_or_more_is_in_two_splits_of_any_set():
    train, validation, test = (
        set().union(*(long_texts(ASSETS / name / split) for name in NUM_ROWS))
        for split in ("train", "validation", "test")
    )
    assert not train & validation and not train & test and not validation & test


@each_set
def test_evaluation_splits_hold_no_short_strings(name):
    for split in ("validation", "test"):
        assert all(len(row["text"].split()) >= 3 for row in read_metadata(ASSETS / name / split))


def test_the_new_flite_voice_is_in_the_test_split_only():
    folder = ASSETS / "flite_digits"
    heard = {row["speaker"] for split in ("train", "validation") for row in read_metadata(folder / split)}
    test_rows = read_metadata(folder / "test")
    for row in test_rows:
        assert row["condition"] == ("seen voice" if row["speaker"] in heard else "new voice")
    assert sum(row["condition"] == "new voice" for row in test_rows) == 60


def test_some_espeak_variants_are_in_the_test_split_only():
    def variants(split):
        return {row["speaker"].split("+")[1] for row in read_metadata(ASSETS / "espeak_digits" / split)}

    assert len(variants("test") - variants("train") - variants("validation")) >= 10


@each_set
def test_files_decode_to_the_stated_duration_and_fit_the_window(name):
    rows = [(split, row) for split in NUM_ROWS[name] for row in read_metadata(ASSETS / name / split)]
    assert all(float(row["duration"]) < 4.9 for _, row in rows)
    for split, row in random.Random(0).sample(rows, 50):
        audio, sampling_rate = soundfile.read(ASSETS / name / split / row["file_name"])
        assert sampling_rate == 16000 and audio.ndim == 1
        assert len(audio) / sampling_rate == pytest.approx(float(row["duration"]), abs=0.002)
        assert np.isfinite(audio).all() and np.abs(audio).max() > 0.01


def test_espeak_script_makes_the_same_bytes_from_the_same_seed(tmp_path):
    pytest.importorskip("espeakng_loader")
    counts = ["--num_validation", "2", "--num_test", "2"]
    make("espeak_digits", tmp_path / "a", "--num_train", "2", *counts)
    # More rows in train must not change those that were there, nor the other splits.
    make("espeak_digits", tmp_path / "b", "--num_train", "4", *counts)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.flac"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    make("espeak_digits", tmp_path / "c", "--num_train", "2", *counts, "--seed", "7")
    assert any((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)


def test_flite_script_makes_what_ships(tmp_path):
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    counts = {"train": 2, "validation": 1, "test": 2, "test_new_voice": 1}
    make("flite_digits", tmp_path, *(word for name, n in counts.items() for word in (f"--num_{name}", str(n))))
    assert read_metadata(tmp_path / "train") == read_metadata(ASSETS / "flite_digits" / "train")[:2]
    assert [row["condition"] for row in read_metadata(tmp_path / "test")] == ["seen voice", "seen voice", "new voice"]
