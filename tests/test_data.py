"""Rows of every origin come in one schema; nothing is dropped silently; no recording stands in two splits."""

import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import one_pass
from loopback_hub import TOKEN, LoopbackHub

from hfspeech.arguments import DataArguments
from hfspeech.audio import _torchcodec
from hfspeech.batching import WhisperCollator
from hfspeech.data import load_speech, load_split
from hfspeech.data.rows import SpeechDataset
from hfspeech.errors import UserError
from hfspeech.text import label_ids

NANO = Path(__file__).parent.parent / "assets/nano_whisper"


def sound(seed, seconds=0.5, sampling_rate=16000):
    generator = np.random.default_rng(seed)
    return (0.1 * generator.normal(size=round(seconds * sampling_rate))).astype("float32")


def flac(seed, seconds=0.5):
    file = io.BytesIO()
    soundfile.write(file, sound(seed, seconds), 16000, format="FLAC")
    return file.getvalue()


def table(path, rows):
    """Writes rows (dicts) as CSV, TSV, JSONL or parquet, by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def audiofolder(folder, sizes=(("train", 8), ("validation", 3), ("test", 4)), seed=0, **columns):
    """Writes an audiofolder; `columns` are further columns, each a function of the row's number."""
    for split, size in sizes:
        rows = []
        for i in range(size):
            seed += 1
            (folder / split).mkdir(parents=True, exist_ok=True)
            (folder / split / f"{split}_{i}.flac").write_bytes(flac(seed, 0.5 + 0.01 * i))
            rows.append(
                {"file_name": f"{split}_{i}.flac", "text": f"word {i}"}
                | {name: value(i) for name, value in columns.items()}
            )
        table(folder / split / "metadata.csv", rows)
    return folder


def arguments(*names, **rest):
    return DataArguments(dataset_name=[str(name) for name in names], **rest)


def parquet_rows(split, size, seed):
    return [
        {"audio": {"bytes": flac(seed + i), "path": f"{split}{i}.flac"}, "text": f"word {i}", "speaker": f"s{i % 4}"}
        for i in range(size)
    ]


def nano(timestamps=False):
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(NANO)
    processor.tokenizer.set_prefix_tokens(predict_timestamps=timestamps)
    return processor


# --- Forms ---------------------------------------------------------------------------------------------------------


def test_audiofolder(tmp_path):
    audiofolder(tmp_path, speaker=lambda i: f"s{i}", accent=lambda i: "north" if i % 2 else "south")
    speech = load_speech(arguments(tmp_path, group_columns=["accent"]))
    assert {name: len(rows) for name, rows in speech.items()} == {"train": 8, "validation": 3, "test": 4}
    row = speech["test"][1]
    assert (row["id"], row["text"], row["speaker"], row["split"], row["accent"]) == (
        "test_1.flac", "word 1", "s1", "test", "north")  # fmt: skip
    assert row["waveform"].shape == (8160,) and row["duration_s"] == pytest.approx(0.51)
    assert "audio" not in row and row["row"] == 2 and row["dataset"] == str(tmp_path)
    assert speech["test"].column("duration_s") == pytest.approx([0.5, 0.51, 0.52, 0.53])
    json.dumps(speech.account)
    assert speech.account["datasets"][0] == {"name": str(tmp_path), "license": None}


def test_a_fingerprint_changes_with_the_rows_and_not_with_their_place(tmp_path):
    def fingerprints(folder, **options):
        splits = load_speech(arguments(folder, **options)).account["splits"]
        return {name: entry["fingerprint"] for name, entry in splits.items()}

    audiofolder(tmp_path / "one", speaker=lambda i: f"s{i % 2}")
    found = fingerprints(tmp_path / "one")
    assert len(set(found.values())) == 3 and all(value.startswith("sha256:") for value in found.values())
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprints(tmp_path / "two") == found
    assert fingerprints(tmp_path / "two", max_test_samples=3)["test"] != found["test"]
    metadata = tmp_path / "two/test/metadata.csv"
    whole = metadata.read_text()
    for old, new in (("word 2", "ward 2"), ("s1", "s9")):
        metadata.write_text(whole.replace(old, new, 1))
        assert fingerprints(tmp_path / "two")["test"] != found["test"]
    metadata.write_text(whole)
    assert fingerprints(tmp_path / "two") == found
    recording = tmp_path / "two/test/test_1.flac"
    content = bytearray(recording.read_bytes())
    content[len(content) // 2] ^= 1  # of the same size and length
    recording.write_bytes(content)
    changed = fingerprints(tmp_path / "two")
    assert changed["test"] != found["test"] and changed["train"] == found["train"]


def test_one_metadata_file_splits_by_folder_or_by_column(tmp_path):
    audiofolder(tmp_path)
    rows = [{"file_name": f"{split}/{split}_{i}.flac", "text": "a"} for split, n in
            (("train", 8), ("validation", 3), ("test", 4)) for i in range(n)]  # fmt: skip
    for split in ("train", "validation", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    table(tmp_path / "metadata.jsonl", rows)
    assert len(load_speech(arguments(tmp_path))["test"]) == 4
    table(tmp_path / "all.csv", [row | {"split": "test" if i > 9 else "dev" if i > 7 else "train"}
                                 for i, row in enumerate(rows)])  # fmt: skip
    speech = load_speech(arguments(tmp_path / "all.csv"))
    assert {name: len(rows) for name, rows in speech.items()} == {"train": 8, "validation": 2, "test": 5}


def test_common_voice(tmp_path):
    seed = 0
    for split, size in (("train", 4), ("dev", 2), ("test", 3)):
        rows = []
        for _ in range(size):
            seed += 1
            name = f"common_voice_{seed}.mp3"
            (tmp_path / "clips").mkdir(exist_ok=True)
            soundfile.write(tmp_path / "clips" / name, sound(seed, 1.0, 48000), 48000)
            rows.append(f'c{seed}\t{name}\tHe said "yes\t2\t0\tteens\tmale\tScottish')
        head = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents"
        (tmp_path / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n")
    speech = load_speech(arguments(tmp_path, group_columns=["accents"]))
    assert {name: len(rows) for name, rows in speech.items()} == {"train": 4, "validation": 2, "test": 3}
    row = speech["test"][0]
    assert row["text"] == 'He said "yes' and row["speaker"] == "c7" and row["accents"] == "Scottish"
    assert len(row["waveform"]) == 16000
    alone = load_split(arguments(tmp_path / "test.tsv"), "test")
    assert alone.column("id") == speech["test"].column("id")


def test_nemo_segments(tmp_path):
    long = sound(1, 4.0)
    soundfile.write(tmp_path / "long.wav", long, 16000, subtype="FLOAT")
    table(tmp_path / "manifest.jsonl", [
        {"audio_filepath": "long.wav", "offset": 1.0, "duration": 0.5, "text": "a"},
        {"audio_filepath": str(tmp_path / "long.wav"), "offset": 2.0, "duration": 1.5, "text": "b"},
    ])  # fmt: skip
    rows = load_split(arguments(tmp_path / "manifest.jsonl"), "test")
    assert np.array_equal(rows[0]["waveform"], long[16000:24000])
    assert np.array_equal(rows[1]["waveform"], long[32000:56000])
    assert len(set(rows.column("id"))) == 2


def test_undecoded_audio_is_the_same_bytes_however_rows_were_chosen():
    import datasets

    from hfspeech.data.rows import undecoded

    audio = [
        {"bytes": None if i % 3 == 1 else bytes([i]) * i, "path": None if i % 4 else f"{i}.wav"} for i in range(9)
    ]
    rows = datasets.Dataset.from_dict({"audio": audio})
    chosen = [7, 2, 2, 4]
    for some, numbers in ((rows, range(9)), (rows.select(range(3, 8)), range(3, 8)), (rows.select(chosen), chosen)):
        contents, paths = undecoded(some)
        assert [None if content is None else bytes(content) for content in contents] == [
            audio[i]["bytes"] for i in numbers
        ]
        assert paths == [audio[i]["path"] for i in numbers]


def test_parquet_with_audio_inside(tmp_path):
    for number, (split, size) in enumerate((("train", 12), ("test", 5))):
        table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", parquet_rows(split, size, 100 * number))
    speech = load_speech(arguments(tmp_path))
    assert len(speech["test"]) == 5 and len(speech["test"][4]["waveform"]) == 8000
    alone = load_split(arguments(tmp_path / "data" / "test-00000-of-00001.parquet"), "test")
    assert np.array_equal(alone[2]["waveform"], speech["test"][2]["waveform"])


# --- Mixing and carving --------------------------------------------------------------------------------------------


def test_weights_give_each_dataset_its_share_and_use_every_row(tmp_path):
    a, b = audiofolder(tmp_path / "a"), audiofolder(tmp_path / "b", seed=500)
    table(b / "train" / "metadata.csv", [{"file_name": "train_0.flac", "text": "x"},
                                         {"file_name": "train_1.flac", "text": "y"}])  # fmt: skip
    speech = load_speech(arguments(a, b, dataset_weights=[1.0, 1.0]))
    origins = speech["train"].column("dataset")
    assert origins.count(str(a)) == 8 and origins.count(str(b)) == 8
    assert len(set(speech["train"].column("id"))) == 10
    assert len(speech["test"]) == 8 and len(set(speech["test"].column("id"))) == 8
    plain = load_speech(arguments(a, b))
    assert len(plain["train"]) == 10


def test_retention_share(tmp_path):
    new, old = audiofolder(tmp_path / "new"), audiofolder(tmp_path / "old", seed=500)
    speech = load_speech(arguments(new, retention_dataset_name=str(old), retention_share=0.2))
    origins = speech["train"].column("dataset")
    assert (origins.count(str(new)), origins.count(str(old))) == (8, 2)
    assert set(speech["retention"].column("dataset")) == {str(old)} and len(speech["retention"]) == 4
    again = load_speech(arguments(new, retention_dataset_name=str(old), retention_share=0.2))
    assert again["train"].column("id") == speech["train"].column("id")


def test_validation_is_carved_by_whole_speakers(tmp_path):
    audiofolder(tmp_path, (("train", 20), ("test", 2)), speaker=lambda i: f"s{i % 5}")
    speech = load_speech(arguments(tmp_path, validation_share=0.2))
    assert len(speech["validation"]) == 4 and len(speech["train"]) == 16
    assert not set(speech["validation"].column("speaker")) & set(speech["train"].column("speaker"))


@pytest.mark.parametrize("columns, streaming", [({}, False), ({"speaker": lambda i: f"s{i % 2}"}, False), ({}, True)])
def test_max_eval_samples_holds_for_carved_validation(tmp_path, columns, streaming):
    audiofolder(tmp_path, (("train", 20), ("test", 2)), **columns)
    args = arguments(tmp_path, validation_share=0.5, max_eval_samples=3, streaming=streaming)
    speech = load_speech(args)
    assert len(speech["validation"]) == 3
    if not columns:
        assert len(one_pass(speech["train"]) if streaming else speech["train"]) == 17  # the rest stays for training


def test_retention_splits_may_have_other_names(tmp_path):
    new = audiofolder(tmp_path / "new")
    old = audiofolder(tmp_path / "old", (("clean", 6), ("other", 2)), seed=500)
    given = {"retention_dataset_name": str(old), "retention_share": 0.5, "retention_test_split_name": "other"}
    with pytest.raises(UserError, match="no split named train .*--retention_train_split_name"):
        load_speech(arguments(new, **given))
    with pytest.raises(UserError, match="no split named tset .*--retention_test_split_name"):
        load_speech(arguments(new, **given | {"retention_test_split_name": "tset"}))
    for streaming in (False, True):
        speech = load_speech(arguments(new, **given, retention_train_split_name="clean", streaming=streaming))
        assert len(speech["retention"]) == 2
        origins = [(row["dataset"], row["split"]) for row in one_pass(speech["train"])] if streaming else set(
            zip(speech["train"].column("dataset"), speech["train"].column("split")))  # fmt: skip
        assert set(origins) == {(str(new), "train"), (str(old), "clean")}


def test_several_test_splits_are_joined(tmp_path):
    audiofolder(tmp_path, (("train", 4), ("validation", 2), ("near", 2), ("far", 3)))
    speech = load_speech(arguments(tmp_path, test_split_name=["near", "far"]))
    assert speech["test"].column("split") == ["near"] * 2 + ["far"] * 3


# --- Filters -------------------------------------------------------------------------------------------------------


def test_every_filter_counts_and_shows_an_example(tmp_path):
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(NANO)
    audiofolder(tmp_path, (("train", 4), ("validation", 2), ("test", 7)))
    for name, seconds in (("test_2", 0.05), ("test_3", 9.0)):
        (tmp_path / "test" / f"{name}.flac").write_bytes(flac(900, seconds))
    texts = ["one", "  ", "one", "one", "two " * 30, "one", "three"]
    table(
        tmp_path / "test" / "metadata.csv",
        [{"file_name": f"test_{i}.flac", "text": text} for i, text in enumerate(texts)],
    )
    speech = load_speech(arguments(tmp_path), processor, max_label_length=20)
    assert len(speech["test"]) == 3
    dropped = speech.account["splits"]["test"]["dropped"]
    assert {reason: entry["count"] for reason, entry in dropped.items()} == {
        "empty text": 1,
        "shorter than 0.1 s": 1,
        "longer than 5 s": 1,
        "labels longer than 20 tokens": 1,
    }
    assert dropped["longer than 5 s"]["example"] == "row 4, test_3.flac: 9.00 s"
    longest = len(processor.tokenizer("two " * 30).input_ids) - 1
    assert dropped["labels longer than 20 tokens"]["example"] == f"row 5, test_4.flac: {longest} tokens"
    assert len(load_speech(arguments(tmp_path), processor, max_label_length=longest)["test"]) == 4


def test_characters_that_cannot_be_spelled_are_left_out(tmp_path):
    from transformers import WhisperTokenizer

    from hfspeech.data.rows import Filters

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "\u0120": 3}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>")
    reasons = Filters(0.1, None, tokenizer, 448).reasons(["ab a", "abc"], [1.0, 1.0])
    assert reasons[0] is None
    assert "cannot spell" in reasons[1][0] and "c" in reasons[1][1]


def test_timestamps_count_as_labels_and_may_be_given():
    from hfspeech.data.rows import Filters

    tokenizer = nano(timestamps=True).tokenizer
    length = len(label_ids(tokenizer, "four two", 1.0))
    texts = ["four two", "<|0.20|> four<|0.60|><|0.80|> two<|1.00|>"]
    filters = Filters(0.1, None, tokenizer, length)
    assert filters.reasons(texts, [1.0, 1.0]) == [
        None,
        (f"labels longer than {length} tokens", f"{length + 2} tokens"),
    ]
    filters.max_label_length = length - 1
    assert filters.reasons(texts[:1], [1.0]) == [(f"labels longer than {length - 1} tokens", f"{length} tokens")]


@pytest.mark.parametrize("timestamps", [False, True])
def test_texts_that_are_not_tokenised_would_have_passed(timestamps):
    from hfspeech.data.rows import Filters

    tokenizer = nano(timestamps).tokenizer
    texts = ["x" * n for n in range(1, 12)] + ["日本", "na\u00efve", " a", "a\u0301", "<3", "\U0001f600 ☃", "four two"]
    lengths = [len(label_ids(tokenizer, text, 1.0)) for text in texts]
    for limit in range(min(lengths) - 1, max(lengths) + 1):
        reasons = Filters(0.1, None, tokenizer, limit).reasons(texts, [1.0] * len(texts))
        assert [reason is None for reason in reasons] == [length <= limit for length in lengths]
    ((reason, detail),) = Filters(0.1, None, tokenizer, 448).reasons(["a<|endoftext|>b"], [1.0])
    assert "cannot spell" in reason and "endoftext" in detail


def test_nothing_left_says_why(tmp_path):
    audiofolder(tmp_path)
    with pytest.raises(UserError, match=r"No row of test is left: 4 shorter than 2 s \(row 1, test_0.flac"):
        load_split(arguments(tmp_path, min_duration_in_seconds=2.0), "test")


# --- Bad audio -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, reason", [(b"", "0 bytes"), (b"no audio at all" * 300, "not an audio file"),
                                             (flac(1)[:3000], "truncated")])  # fmt: skip
def test_bad_header_stops_or_is_skipped(tmp_path, content, reason):
    audiofolder(tmp_path)
    (tmp_path / "train" / "train_2.flac").write_bytes(content)
    if reason == "truncated":  # a FLAC header says nothing of the cut: it shows when the row is decoded
        row = load_speech(arguments(tmp_path))["train"][2]
        assert row["waveform"] is None and row["bad_audio"].startswith("row 3, train_2.flac: truncated")
        return
    with pytest.raises(UserError, match=f"Row 3, train_2.flac: {reason}.*--on_bad_audio skip"):
        load_speech(arguments(tmp_path))
    speech = load_speech(arguments(tmp_path, on_bad_audio="skip"))
    assert len(speech["train"]) == 7
    entry = speech.account["splits"]["train"]["dropped"]["bad audio"]
    assert entry["count"] == 1 and entry["example"].startswith("row 3, train_2.flac: ")


@pytest.mark.parametrize(
    "waveform, reason", [(np.zeros(8000), "all samples are zero"), (np.full(8000, np.nan), "NaN")]
)
def test_bad_samples_are_named_when_the_row_is_decoded(tmp_path, waveform, reason):
    audiofolder(tmp_path)
    soundfile.write(tmp_path / "test" / "bad.wav", waveform, 16000, subtype="FLOAT")
    table(tmp_path / "test" / "metadata.csv", [{"file_name": "bad.wav", "text": "a"}])
    row = load_split(arguments(tmp_path), "test")[0]
    assert row["waveform"] is None and row["bad_audio"].startswith(f"row 1, bad.wav: {reason}")


# --- Leaks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["test", "validation"])
def test_same_audio_under_another_name_stops_the_run(tmp_path, other):
    audiofolder(tmp_path)
    (tmp_path / other / f"{other}_1.flac").write_bytes((tmp_path / "train" / "train_5.flac").read_bytes())
    with pytest.raises(UserError, match=rf"1 of the \d rows of {other} .* train .*{other}_1.flac.*train_5.flac"):
        load_speech(arguments(tmp_path))


@pytest.mark.parametrize("in_parquet", [False, True])
def test_recordings_that_differ_at_their_ends_only_are_not_the_same(tmp_path, in_parquet):
    def write(split, values):
        rows = []
        for i, value in enumerate(values):
            waveform = np.full(8000, 0.25)
            waveform[-1] = value
            (tmp_path / split).mkdir(exist_ok=True)
            soundfile.write(tmp_path / split / f"{i}.wav", waveform, 16000)
            content = (tmp_path / split / f"{i}.wav").read_bytes()
            rows.append(({"audio": {"bytes": content, "path": None}} if in_parquet else {"file_name": f"{i}.wav"})
                        | {"text": "a"})  # fmt: skip
        table(tmp_path / f"{split}.parquet" if in_parquet else tmp_path / split / "metadata.csv", rows)

    write("train", [0.1, 0.2, 0.3])
    write("validation", [0.4, 0.5])
    write("test", [0.6, 0.7])
    assert len(load_speech(arguments(tmp_path))["train"]) == 3
    write("test", [0.6, 0.2])
    with pytest.raises(UserError, match=r"1 of the 2 rows of test .* train \(same audio\): row 2 .* is row 2 "):
        load_speech(arguments(tmp_path))


def test_same_id_stops_the_run_but_row_numbers_do_not(tmp_path):
    audiofolder(tmp_path, clip=lambda i: f"clip{i}", id=lambda i: i)
    assert len(load_speech(arguments(tmp_path))["train"]) == 8
    with pytest.raises(UserError, match="same id"):
        load_speech(arguments(tmp_path, id_column_name="clip"))


def test_numbers_in_any_order_are_no_ids_unless_they_are_said_to_be(tmp_path):
    audiofolder(tmp_path, id=lambda i: (5 * i + 3) % 8)
    assert len(load_speech(arguments(tmp_path))["test"]) == 4
    with pytest.raises(UserError, match="same id"):
        load_speech(arguments(tmp_path, id_column_name="id"))


def test_a_test_row_in_carved_validation_has_to_leave_train(tmp_path):
    audiofolder(tmp_path, (("train", 10), ("test", 2)))
    carved = load_speech(arguments(tmp_path)).pop("validation").column("id")[0]
    (tmp_path / "test" / "test_1.flac").write_bytes((tmp_path / "train" / carved).read_bytes())
    with pytest.raises(UserError, match="also stand in validation .* Take them out of train,"):
        load_speech(arguments(tmp_path))


def test_segments_leak_only_where_they_overlap(tmp_path):
    soundfile.write(tmp_path / "long.wav", sound(1, 6.0), 16000)

    def write(test_offset):
        for split, offset in (("train", 0.0), ("validation", 5.0), ("test", test_offset)):
            table(
                tmp_path / f"{split}.jsonl",
                [{"audio_filepath": "long.wav", "offset": offset, "duration": 1.0, "text": "a"}],
            )

    write(2.0)
    assert len(load_speech(arguments(tmp_path))["test"]) == 1
    write(0.5)
    with pytest.raises(UserError, match="same audio"):
        load_speech(arguments(tmp_path))


# --- Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset_name": ["./nowhere"]}, "No such file or folder: ./nowhere"),
        ({"dataset_name": ["nowhere"]}, "owner/name"),
        ({"text_column_name": "txt"}, "no column txt for --text_column_name; it has: .*Did you mean text"),
        ({"group_columns": ["accnt"]}, "no column accnt for --group_columns.*Did you mean accent"),
        ({"test_split_name": ["tset"]}, "no split named tset .*--test_split_name.*Did you mean test"),
        ({"eval_split_name": "dev2"}, "no split named dev2 .*--eval_split_name"),
        ({"dataset_weights": [1.0, 2.0]}, "--dataset_weights"),
        ({"group_columns": ["speaker"]}, "no column speaker for --group_columns; it has: "),
        ({"max_duration_in_seconds": 8.0}, "8 is longer than the model's window of 5 s.*give 5 at most"),
        ({"dataset_config_name": ["a", "b"]}, "--dataset_config_name has 2 values for 1 datasets"),
    ],
)
def test_mistakes_say_what_to_type(tmp_path, change, message):
    audiofolder(tmp_path, accent=lambda i: "north")
    with pytest.raises(UserError, match=message):
        load_speech(DataArguments(**({"dataset_name": [str(tmp_path)]} | change)), nano())


def test_ambiguous_text_column(tmp_path):
    audiofolder(tmp_path, sentence=lambda i: "a")
    with pytest.raises(
        UserError, match="several columns for the text: text, sentence; choose with --text_column_name"
    ):
        load_speech(arguments(tmp_path))
    assert load_speech(arguments(tmp_path, text_column_name="sentence"))["test"][0]["text"] == "a"


def test_folder_without_metadata_says_what_to_write(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(1))
    with pytest.raises(UserError, match="metadata.csv with the columns file_name and text"):
        load_speech(arguments(tmp_path))


def test_durations_in_milliseconds_are_not_believed(tmp_path):
    audiofolder(tmp_path, duration=lambda i: 500 + 10 * i)
    assert load_speech(arguments(tmp_path))["test"].column("duration_s") == pytest.approx([0.5, 0.51, 0.52, 0.53])


# --- Streaming and the Hub -----------------------------------------------------------------------------------------


def test_streamed_rows_are_the_loaded_rows(tmp_path):
    audiofolder(tmp_path, speaker=lambda i: f"s{i}")
    table(
        tmp_path / "train" / "metadata.csv",
        [{"file_name": f"train_{i}.flac", "text": "" if i == 3 else f"word {i}"} for i in range(8)],
    )
    loaded, streamed = load_speech(arguments(tmp_path)), load_speech(arguments(tmp_path, streaming=True))
    rows = sorted(one_pass(streamed["train"]), key=lambda row: row["row"])
    assert [row["text"] for row in rows] == loaded["train"].column("text")
    assert [row["id"] for row in rows] == loaded["train"].column("id")
    for row, other in zip(rows, (loaded["train"][i] for i in range(7))):
        assert np.array_equal(row["waveform"], other["waveform"])
    assert not {"audio", "recording_id", "num_bytes"} & set(rows[0])
    assert len(streamed["test"]) == 4


def collated(rows):
    return WhisperCollator(nano())(list(rows) if isinstance(rows, SpeechDataset) else one_pass(rows))


def test_rows_left_out_of_a_stream_come_along_from_a_worker(tmp_path):
    audiofolder(tmp_path)
    table(
        tmp_path / "train" / "metadata.csv",
        [{"file_name": f"train_{i}.flac", "text": "" if i in (1, 2) else "word"} for i in range(8)],
    )
    speech = load_speech(arguments(tmp_path, streaming=True), nano())
    loader = torch.utils.data.DataLoader(
        speech["train"], batch_size=4, num_workers=1, collate_fn=WhisperCollator(nano()),
        multiprocessing_context="fork",
    )  # fmt: skip
    batches = list(itertools.islice(loader, 3))
    assert [entry for batch in batches for entry in batch["left_out"]] == 2 * [  # in each pass
        ["empty text", f"{tmp_path}, row 2, train_1.flac", ""],
        ["empty text", f"{tmp_path}, row 3, train_2.flac", ""],
    ]
    assert sum(len(batch["index"]) for batch in batches) == 2 * 6
    assert speech.account["splits"]["train"]["dropped"] == {}


def test_bad_audio_in_a_stream_is_reported_in_its_batch(tmp_path):
    audiofolder(tmp_path)
    soundfile.write(tmp_path / "train" / "train_2.flac", np.zeros(8000), 16000)
    (tmp_path / "train" / "train_4.flac").write_bytes(b"")
    given = {"streaming": True, "on_bad_audio": "skip"}
    batch = collated(load_speech(arguments(tmp_path, **given))["train"])
    assert batch["bad_audio"] == ["row 3, train_2.flac: all samples are zero"]
    assert batch["left_out"] == [["bad audio", f"{tmp_path}, row 5, train_4.flac", "0 bytes"]]  # its header tells
    assert len(batch["index"]) == 6 and batch["fatal"] == []
    (row,) = load_speech(arguments(tmp_path, **given | {"on_bad_audio": "error"}))["train"]
    assert "train: Row 5, train_4.flac: 0 bytes. Leave such rows out with --on_bad_audio skip." in row["fatal"]


def test_what_stops_a_run_is_handed_on_and_not_raised_where_rows_are_read(tmp_path):
    if _torchcodec() is not None:
        pytest.skip("FFmpeg is here, so no format misses it")
    audiofolder(tmp_path)
    video = b"\0\0\0\x20ftypM4A " + bytes(5000)
    table(
        tmp_path / "train" / "metadata.csv",
        [{"file_name": f"train_{i}.flac", "text": "a", "duration": 0.5 + 0.01 * i} for i in range(8)],
    )
    (tmp_path / "train" / "train_5.flac").write_bytes(video)
    for rows in (load_speech(arguments(tmp_path, streaming=True, on_bad_audio="skip"))["train"],
                 load_speech(arguments(tmp_path, on_bad_audio="skip"))["train"]):  # fmt: skip
        (sentence,) = collated(rows)["fatal"]
        assert "FFmpeg" in sentence


def test_a_time_in_a_stream_that_is_no_number_is_handed_on(tmp_path):
    audiofolder(tmp_path)
    table(
        tmp_path / "train" / "metadata.csv",
        [{"file_name": f"train_{i}.flac", "text": "a", "offset": "0" if i else "soon"} for i in range(8)],
    )
    batch = collated(load_speech(arguments(tmp_path, streaming=True))["train"])
    assert len(batch["fatal"]) == 1 and "'soon' is not a number of seconds" in batch["fatal"][0]


def test_several_streams_are_mixed_without_losing_what_is_known_of_their_rows(tmp_path):
    a, b = audiofolder(tmp_path / "a"), audiofolder(tmp_path / "b", seed=500)
    for folder in (a, b):
        (folder / "train" / "train_2.flac").write_bytes(b"")
        table(
            folder / "train" / "metadata.csv",
            [{"file_name": f"train_{i}.flac", "text": "" if i == 1 else "word"} for i in range(8)],
        )
    rows = one_pass(load_speech(arguments(a, b, streaming=True, on_bad_audio="skip"))["train"])
    assert {row["dataset"] for row in rows} == {str(a), str(b)}
    assert all(row["waveform"].dtype == np.float32 for row in rows if row["waveform"] is not None)
    batch = collated(rows)
    rejected = [("bad audio", "row 3, train_2.flac", "0 bytes"), ("empty text", "row 2, train_1.flac", "")]
    left_out = [[why, f"{folder}, {row}", detail] for folder in (a, b) for why, row, detail in rejected]
    assert sorted(batch["left_out"]) == sorted(left_out)


@pytest.mark.parametrize("as_path", [False, True])
def test_streamed_row_of_the_test_split_is_fatal(tmp_path, as_path):
    if as_path:
        audiofolder(tmp_path)
        (tmp_path / "test/test_1.flac").write_bytes((tmp_path / "train/train_5.flac").read_bytes())
    else:
        for number, (split, size) in enumerate((("train", 6), ("validation", 2), ("test", 1))):
            table(tmp_path / f"{split}.parquet", parquet_rows(split, size, 2 if split == "test" else 100 * number))
    batch = collated(load_speech(arguments(tmp_path, streaming=True))["train"])
    (sentence,) = batch["fatal"]
    assert "also stands in test; take it out" in sentence and ("train_5.flac" if as_path else "row 3") in sentence


@pytest.mark.parametrize("test_offset, fatal", [(2.0, []), (0.5, ["test"]), (5.5, [])])
def test_streamed_segments_leak_only_where_they_overlap(tmp_path, test_offset, fatal):
    soundfile.write(tmp_path / "long.wav", sound(1, 8.0), 16000)
    for split, offset in (("train", 0.0), ("validation", 7.0), ("test", test_offset)):
        table(
            tmp_path / f"{split}.jsonl",
            [{"audio_filepath": "long.wav", "offset": offset, "duration": 1.0, "text": "a"}],
        )
    batch = collated(load_speech(arguments(tmp_path, streaming=True))["train"])
    assert [sentence.split("also stands in ")[1].split(";")[0] for sentence in batch["fatal"]] == fatal


PROGRAM = """
import itertools, json, sys
from hfspeech.arguments import DataArguments
from hfspeech.data import load_speech
from hfspeech.errors import UserError
for change in json.loads(sys.argv[1]):
    try:
        speech = load_speech(DataArguments(**change))
        rows = itertools.takewhile(lambda row: row["epoch"] == 0, speech["train"])
        train = list(rows) if change.get("streaming") else [speech["train"][i] for i in range(2)]
        print(json.dumps({"train": len(train) if change.get("streaming") else len(speech["train"]),
                          "test": len(speech["test"]), "samples": len(train[0]["waveform"]),
                          "commit": speech.account["datasets"][0]["commit"]}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def load_in_subprocess(env, *changes):
    env = env | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(changes)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_hub_datasets(tmp_path):
    for seed, id in ((0, "me/public"), (1000, "me/private"), (2000, "me/gated")):
        folder = tmp_path / "hub/datasets" / id / "data"
        table(folder / "train-00000-of-00001.parquet", parquet_rows("train", 40, seed))
        table(folder / "test-00000-of-00001.parquet", parquet_rows("test", 4, seed + 100))
    old = {"retention_dataset_name": "me/public"}
    with LoopbackHub(tmp_path / "hub", private=["me/private"], gated=["me/gated"]) as hub:
        public, streamed, private, gated, revision, config, split, old_revision, old_config = load_in_subprocess(
            hub.env(tmp_path / "home"),
            {"dataset_name": ["me/public"]},
            {"dataset_name": ["me/public"], "streaming": True},
            {"dataset_name": ["me/private"]},
            {"dataset_name": ["me/gated"]},
            {"dataset_name": ["me/public"], "dataset_revision": ["missing"]},
            {"dataset_name": ["me/public"], "dataset_config_name": ["xx"]},
            {"dataset_name": ["me/public"], "test_split_name": ["tst"]},
            {"dataset_name": ["me/public"]} | old | {"retention_dataset_revision": "missing"},
            {"dataset_name": ["me/public"]} | old | {"retention_dataset_config_name": "xx"},
        )
        commit = hub.commit("datasets", "me/public")
        assert public == {"train": 30, "test": 4, "samples": 8000, "commit": commit}
        assert streamed["train"] == 38 and streamed["commit"] == commit
        assert "hf auth login" in private["error"] and "private" in private["error"]
        assert "hf auth login" in gated["error"]
        assert "no revision missing" in revision["error"]
        assert "one of: default" in config["error"]
        assert "it has: train, test" in split["error"]
        assert "--retention_dataset_revision" in old_revision["error"]
        assert "--retention_dataset_config_name" in old_config["error"]
        with_token = load_in_subprocess(
            hub.env(tmp_path / "home", TOKEN), {"dataset_name": ["me/private"]},
            {"dataset_name": ["me/gated"], "streaming": True},
        )  # fmt: skip
        assert [row["test"] for row in with_token] == [4, 4]
        offline = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    cached, absent = load_in_subprocess(offline, {"dataset_name": ["me/public"]}, {"dataset_name": ["me/none"]})
    assert cached == public
    assert "not in the cache" in absent["error"] and "HF_HUB_OFFLINE" in absent["error"]


class TestSpokenText:
    """Rows whose text is to be spoken: what the tokenizer lacks is counted, what the ear will miss is said."""

    @pytest.fixture
    def load(self, nano_speecht5_processor):
        from hfspeech.spelling import TextFrontEnd

        front_end = TextFrontEnd(nano_speecht5_processor.tokenizer, "en")

        def load(folder, max_tokens=200, **rest):
            return load_speech(arguments(folder, **rest), nano_speecht5_processor, 42, max_tokens, front_end)

        return load

    def test_unknown_characters_are_counted_before_training(self, load, tmp_path, caplog):
        audiofolder(tmp_path, speaker=lambda i: "ann", sentence=lambda i: "łódź" if i == 0 else "word 2")
        speech = load(tmp_path, text_column_name="sentence")
        # One row of each of three splits; numbers are spelled out, so the digit is no unknown character.
        assert speech.account["unknown_characters"] == {"ł": 3, "ó": 3, "ź": 3}
        assert "'ł' 3 times" in caplog.text and "--add_characters" in caplog.text

    def test_long_texts_and_long_recordings_are_left_out(self, load, tmp_path):
        audiofolder(tmp_path, speaker=lambda i: "ann", sentence=lambda i: "a word " * (20 if i == 0 else 1))
        speech = load(tmp_path, max_tokens=50, text_column_name="sentence", max_duration_in_seconds=0.555)
        dropped = speech.account["splits"]["train"]["dropped"]
        assert dropped["text longer than 50 tokens"]["count"] == 1
        assert dropped["longer than 0.555 s"]["count"] == 2
        assert len(speech["train"]) == 5

    def test_low_and_mixed_sampling_rates_are_warned_of(self, load, tmp_path, caplog):
        audiofolder(tmp_path, speaker=lambda i: "ann")
        for i in range(3):
            soundfile.write(tmp_path / f"train/train_{i}.flac", sound(100 + i, 0.5, 8000), 8000)
        load(tmp_path)
        assert "train: 3 of the first 8 recordings have 8000 Hz, so nothing above 4000 Hz" in caplog.text
        assert "recordings of different sampling rates (5 of 16000 Hz, 3 of 8000 Hz)" in caplog.text

    def test_streaming_is_refused(self, load, tmp_path):
        audiofolder(tmp_path)
        with pytest.raises(UserError, match="leave --streaming out"):
            load(tmp_path, streaming=True)

    def test_speaker_embeddings_come_from_a_column(self, load, tmp_path):
        for split, size in (("train", 4), ("validation", 2), ("test", 2)):
            rows = parquet_rows(split, size, {"train": 0, "validation": 50, "test": 90}[split])
            for i, row in enumerate(rows):
                row["xvector"] = [float(i + 1)] * 512
            table(tmp_path / f"{split}.parquet", rows)
        speech = load(tmp_path, speaker_embedding_column_name="xvector")
        assert speech["train"][2]["speaker_embedding"] == [3.0] * 512
        assert "speaker_embedding" not in speech["train"].record(2)
        with pytest.raises(UserError, match="no column xvectors .* xvector"):
            load(tmp_path, speaker_embedding_column_name="xvectors")
        with pytest.raises(UserError, match="does not hold 512 numbers"):
            load(tmp_path, speaker_embedding_column_name="text")


def test_rows_of_some_speakers_only(tmp_path):
    audiofolder(tmp_path, speaker=lambda i: ["ann", "bob"][i % 2])
    speech = load_speech(arguments(tmp_path, speakers=["bob"]))
    assert {name for rows in speech.values() for name in rows.column("speaker")} == {"bob"}
    dropped = speech.account["splits"]["train"]["dropped"]
    assert dropped == {"another speaker": {"count": 4, "example": "row 1, train_0.flac: ann"}}
    few = load_speech(arguments(tmp_path, speakers=["bob"], max_train_samples=3))  # three of bob's
    assert few["train"].column("id") == speech["train"].column("id")[:3]
    with pytest.raises(UserError, match="has no row of --speakers bop; it has: ann, bob. Did you mean"):
        load_speech(arguments(tmp_path, speakers=["bop"]))
    with pytest.raises(UserError, match="leave --streaming out"):
        load_speech(arguments(tmp_path, speakers=["bob"], streaming=True))
