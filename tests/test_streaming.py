"""A stream loses nothing: every row once a pass whoever reads, and a run that stops goes on with the very next row."""

import csv
import itertools
import json
import shutil
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import launch, one_pass
from test_training import QUIET, make_trainer

from hfspeech.arguments import DataArguments
from hfspeech.data import load_speech, streaming
from hfspeech.errors import UserError
from hfspeech.runs import last_checkpoint

SHARDS = (5, 9, 3, 7)  # rows of the training files
START = [0, 0, 0, 0]


def write_parquet(few_digits, folder, shards=SHARDS, text=lambda i, text: text):
    """Writes the digits as parquet, train in several files of uneven length, with small row groups."""
    folder.mkdir()
    for split, counts in (("train", shards), ("validation", (6,)), ("test", (8,))):
        with (few_digits / split / "metadata.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        audio = [{"bytes": (few_digits / split / r["file_name"]).read_bytes(), "path": r["file_name"]} for r in rows]
        texts = [text(i, row["text"]) if split == "train" else row["text"] for i, row in enumerate(rows)]
        table = pyarrow.table({"audio": audio, "text": texts, "speaker": [row["speaker"] for row in rows]})
        for number, start in enumerate(itertools.accumulate(counts[:-1], initial=0)):
            path = folder / f"{split}-{number:05d}-of-{len(counts):05d}.parquet"
            pyarrow.parquet.write_table(table[start : start + counts[number]], path, row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def shards(few_digits, tmp_path_factory):
    return write_parquet(few_digits, tmp_path_factory.mktemp("shards") / "digits")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that shuffling and resuming meet their ends."""
    monkeypatch.setattr(streaming, "SHUFFLE_ROWS", 4)
    monkeypatch.setattr(streaming, "TABLE_ROWS", 2)


def stream_of(*folders, **settings):
    return load_speech(DataArguments(dataset_name=[str(f) for f in folders], streaming=True, **settings))["train"]


def rows_of(source, reader, num_readers, num_passes):
    """Returns (pass, id) of what falls to a reader, in its order."""
    rows = ((row["epoch"], row["id"]) for _, row in source.read(reader, num_readers, (0, 0), START))
    return list(itertools.takewhile(lambda row: row[0] < num_passes, rows))


# Every row once


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 9])
def test_every_row_comes_once_a_pass_whoever_reads(few_digits, shards, num_readers):
    for folder in (shards, few_digits):
        (source,) = stream_of(folder).sources
        shares = [rows_of(source, reader, num_readers, 3) for reader in range(num_readers)]
        counts = Counter(row for share in shares for row in share)
        assert set(counts.values()) == {1} and len(counts) == 3 * 24
        assert all({number for number, _ in share} == {0, 1, 2} for share in shares)  # nobody is idle


def loader_of(stream, process_index, processes, num_workers, *begin, batch_size=4):
    stream.begin(process_index, processes, processes * max(1, num_workers), *begin)
    return torch.utils.data.DataLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=list)


def test_processes_and_their_workers_share_the_rows(shards):
    stream, seen = stream_of(shards), Counter()
    for process_index in range(2):
        batches = itertools.islice(loader_of(stream, process_index, 2, 3, batch_size=2), 15)
        seen.update((row["epoch"], row["id"]) for batch in batches for row in batch)
    assert set(seen.values()) == {1} and sum(seen.values()) == 2 * 15 * 2  # all processes go on for as long as asked
    assert sum(number == 0 for number, _ in seen) == 24
    stream.begin(1, 2, 6, 10, [(reader, START) for reader in range(6)])
    assert set(stream.places) == {1, 3, 5}  # a process minds its own readers


def test_the_order_depends_on_the_seed_and_the_pass_only(shards):
    def order(seed):
        speech = load_speech(DataArguments(dataset_name=[str(shards)], streaming=True), seed=seed)
        return [row["id"] for row in itertools.islice(speech["train"], 48)]

    first = order(1)
    assert order(1) == first and order(2) != first
    assert sorted(first[:24]) == sorted(first[24:]) and first[:24] != first[24:]


def test_rows_taken_for_validation_and_too_many_rows_are_not_trained_on(few_digits, tmp_path):
    folder = write_parquet(few_digits, tmp_path / "digits")
    (folder / "validation-00000-of-00001.parquet").unlink()
    rows = load_speech(DataArguments(dataset_name=[str(folder)], validation_share=0.3, max_eval_samples=7))["train"]
    settings = {"streaming": True, "max_eval_samples": 7}
    speech = load_speech(DataArguments(dataset_name=[str(folder)], **settings))  # a file and two rows of the next
    validation, ids = speech["validation"].column("id"), [row["id"] for row in one_pass(speech["train"])]
    everything = {*rows.column("id"), *validation, *ids}
    assert len(validation) == 7 and len(ids) == len(set(ids)) == 17 and not set(validation) & set(ids)
    assert len(everything) == 24
    few = one_pass(stream_of(folder, max_eval_samples=7, max_train_samples=9))
    assert sorted(row["row"] for row in few) == list(range(8, 17))


@pytest.mark.parametrize("weights, share", [(None, 0.5), ([3.0, 1.0], 0.25)])
def test_mixed_streams_keep_their_shares(few_digits, shards, weights, share, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_ROWS", 500)
    stream = stream_of(shards, few_digits, dataset_weights=weights)
    stream._decoded = lambda row: row
    names = [row["dataset"] for row in itertools.islice(stream, 600)]
    assert names.count(str(few_digits)) / 600 == pytest.approx(share, abs=0.05)


# Going on


def known_of(batch):
    return [(row["dataset"], row["id"], row["epoch"], row["waveform"].tobytes()) for row in batch]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_reading_goes_on_with_the_next_row_and_decodes_none_twice(few_digits, shards, num_workers, monkeypatch):
    settings = {"retention_dataset_name": str(few_digits), "retention_share": 0.3}
    batches = list(itertools.islice(loader_of(stream_of(shards, **settings), 0, 1, num_workers), 23))
    decoded, decode_row = [], streaming.decode_row
    monkeypatch.setattr(streaming, "decode_row", lambda row: (decoded.append(row["id"]), decode_row(row)))

    def go_on(num_batches, processes, num_workers, count):
        places = {batch[-1]["place"][0]: batch[-1]["place"][1:] for batch in batches[:num_batches]}
        places = json.loads(json.dumps(list(places.items())))  # as a checkpoint keeps them
        stream = stream_of(shards, **settings)
        of_each = [
            list(
                itertools.islice(loader_of(stream, i, processes, num_workers, num_batches, places), count // processes)
            )
            for i in range(processes)
        ]
        return [batch for step in zip(*of_each) for batch in step]

    for num_batches in (1, 8, 17):
        decoded.clear()
        again = go_on(num_batches, 1, num_workers, 5)
        assert list(map(known_of, again)) == list(map(known_of, batches[num_batches : num_batches + 5]))
        if num_workers == 0:
            assert decoded == [row["id"] for batch in again for row in batch]
    if num_workers == 3:  # as many readers in other processes
        assert list(map(known_of, go_on(18, 3, 1, 3))) == list(map(known_of, batches[18:21]))


def test_a_run_killed_in_a_later_pass_ends_as_the_uninterrupted_one(shards, tmp_path):
    settings = {
        **QUIET, "streaming": True, "max_steps": 7, "save_steps": 4, "save_total_limit": None, "lora": False,
        "gradient_accumulation_steps": 2, "model_changes": {"dropout": 0.1}, "dataloader_num_workers": 3,
    }  # fmt: skip
    whole = make_trainer(shards, tmp_path / "whole", **settings)
    whole.train_or_resume()
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "run/checkpoint-4")  # 32 rows on: in the second pass
    resumed = make_trainer(shards, tmp_path / "run", **settings | {"dataloader_num_workers": 0})
    resumed.train_or_resume()
    assert resumed.state.global_step == 7 and resumed.state.epoch == whole.state.epoch == 1.0
    assert [e["loss"] for e in resumed.state.log_history[:7]] == [e["loss"] for e in whole.state.log_history[:7]]
    assert all(torch.equal(one, two) for one, two in zip(whole.model.parameters(), resumed.model.parameters()))
    read = [json.loads((tmp_path / f"{name}/checkpoint-7/progress.json").read_text()) for name in ("whole", "run")]
    assert read[0]["stream"] == read[1]["stream"] and read[0]["stream"]["num_batches"] == 14
    assert read[0]["audio_seconds"] == pytest.approx(read[1]["audio_seconds"])


def test_two_processes_take_the_same_steps_over_uneven_files(shards, tmp_path):
    launch(
        "whisper_full", "--streaming", "true", "--max_steps", 7, "--eval_strategy", "no", "--eval_on_start", "false",
        "--save_steps", 7, "--load_best_model_at_end", "false", "--report_to", "none", "--dataloader_num_workers", 1,
        "--per_device_train_batch_size", 4, data=shards, output_dir=tmp_path / "run", processes=2,
    )  # fmt: skip
    read = json.loads((tmp_path / "run/checkpoint-7/progress.json").read_text())["stream"]
    assert read["num_batches"] == 14
    assert sorted((reader, place[0]) for reader, place in read["places"]) == [(0, 28), (1, 28)]
    assert all(place[1][0] >= 1 for _, place in read["places"])  # 56 rows on, both have begun anew


# What is left out, and what stops the run


def test_a_stream_s_run_is_the_loaded_one_s(few_digits, tmp_path):
    """The same account, the same figures before, and where all rows are one batch the same training."""
    data = write_parquet(
        few_digits, tmp_path / "digits", text=lambda i, text: ["", "zero zero " * 300, text][min(i, 2)]
    )
    results, trainers = [], []
    for streams in (False, True):
        trainer = make_trainer(
            data, tmp_path / str(streams), streaming=streams, **QUIET | {"eval_on_start": True}, max_steps=2, lora=False,
            encoder_window="full", per_device_train_batch_size=22, dataloader_num_workers=0,
        )  # fmt: skip
        trainer.measure("before", trainer.speech)
        trainer.train_or_resume()
        trainer.write_record(trainer.speech)
        results.append(json.loads((tmp_path / str(streams) / "run.json").read_text()))
        trainers.append(trainer)
    loaded, streamed = results
    assert streamed["before"] == loaded["before"] and trainers[0].predictions == trainers[1].predictions
    dropped = [result["rows"]["account"]["splits"]["train"]["dropped"] for result in results]
    assert {reason: entry["count"] for reason, entry in dropped[0].items()} == {
        reason: entry["count"] for reason, entry in dropped[1].items()
    }
    assert len(dropped[0]) == 2
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, two in zip(*(trainer.model.parameters() for trainer in trainers)):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_file_that_breaks_off_stops_the_run_and_loses_nothing(few_digits, tmp_path):
    data = write_parquet(few_digits, tmp_path / "digits")
    settings = {**QUIET, "streaming": True, "max_steps": 6, "save_steps": 6, "dataloader_num_workers": 0}
    whole = make_trainer(data, tmp_path / "whole", **settings)
    whole.train_or_resume()
    path = data / "train-00001-of-00004.parquet"
    content = path.read_bytes()
    trainer = make_trainer(data, tmp_path / "run", **settings)
    cut = trainer.train_dataset.sources[0]
    half = len(content) // 2
    path.write_bytes(b"\0" * half + content[half:])  # the footer is whole, the pages are not
    with pytest.raises(UserError, match="train, shard 1: nothing can be read after row 0 .*") as caught:
        trainer.train_or_resume()
    assert "\n" not in str(caught.value) and len(cut.shards) == 4
    step = trainer.state.global_step
    assert step and f"The {step} steps trained so far are saved" in str(caught.value)
    assert last_checkpoint(tmp_path / "run", step)
    path.write_bytes(content)
    trainer = make_trainer(data, tmp_path / "run", **settings)
    trainer.train_or_resume()
    assert all(torch.equal(one, two) for one, two in zip(whole.model.parameters(), trainer.model.parameters()))


def test_a_stream_without_a_good_row_says_so(few_digits, tmp_path):
    (row,) = stream_of(write_parquet(few_digits, tmp_path / "digits", text=lambda i, text: ""))
    assert "no row of it can be trained on" in row["fatal"]
