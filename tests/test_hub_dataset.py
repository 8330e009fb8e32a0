"""Local recordings become a dataset on a Hub: what is refused, what is written, and that everything reads it back."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import yaml
from loopback_hub import TOKEN, LoopbackHub

from hfspeech.arguments import DataArguments
from hfspeech.data.sources import LocalSource
from hfspeech.errors import UserError
from hfspeech.publish.dataset import push_dataset, write_parquet

READ = """
import json, sys
import datasets
from hfspeech.arguments import DataArguments
from hfspeech.data import load_split

stock = datasets.load_dataset("tester/digits").cast_column("audio", datasets.Audio(decode=False))
few = next(iter(datasets.load_dataset("tester/digits", "few", split="train", streaming=True).decode(False)))
own = load_split(DataArguments(dataset_name=["tester/digits"], dataset_revision=["v1"]), "test")
print(json.dumps({
    "rows": {name: len(rows) for name, rows in stock.items()},
    "first": [stock["test"][0]["text"], stock["test"][0]["audio"]["path"], stock["test"][0]["audio"]["bytes"].hex()],
    "few": few["text"],
    "own": [len(own), own[0]["text"], own[0]["speaker"], len(own[0]["waveform"]) / 16000],
    "commit": own.account["datasets"][0]["commit"],
}))
"""


def test_from_a_folder_to_the_hub_and_back(few_digits, tmp_path):
    with LoopbackHub(tmp_path / "repos") as hub:
        env = {**hub.env(tmp_path / "home", TOKEN), "HF_HUB_OFFLINE": "0"}

        def command(*args):
            return subprocess.run(
                [sys.executable, *map(str, args)], env=env, text=True, capture_output=True, timeout=300
            )

        flags = ["--language", "en", "--license", "cc0-1.0", "--private", "--tag", "v1"]
        hub.fail("PUT", "/lfs/", cut=True)
        done = command("-m", "hfspeech.cli", "push-dataset", few_digits, "digits", *flags)
        assert done.returncode == 0, done.stderr
        assert "--dataset_name tester/digits --dataset_revision v1" in done.stdout
        assert hub.repo("datasets", "tester/digits").private
        shutil.copytree(few_digits, tmp_path / "few", ignore=shutil.ignore_patterns("test"))
        done = command("-m", "hfspeech.cli", "push-dataset", tmp_path / "few", "digits", "--config", "few")
        assert done.returncode == 0, done.stderr
        read = command("-c", READ)
        assert read.returncode == 0, read.stderr
        found = json.loads(read.stdout)
        first = (few_digits / "test" / found["first"][1]).read_bytes()
        assert found["rows"] == {"train": 24, "validation": 6, "test": 8} and found["first"][2] == first.hex()
        assert found["own"][:2] == [8, found["first"][0]] and found["own"][3] > 0.5 and found["few"]
        assert found["commit"] == hub.commit("datasets", "tester/digits", "v1")
        card = hub.read("datasets", "tester/digits", "README.md").decode()
        metadata = yaml.safe_load(card.split("---")[1])
        assert metadata["language"] == ["en"] and metadata["license"] == "cc0-1.0"
        assert "automatic-speech-recognition" in metadata["task_categories"]
        assert [config["config_name"] for config in metadata["configs"]] == ["default", "few"]
        assert "| test | 8 |" in card and "16000 Hz" in card and "`--dataset_name tester/digits`" in card
        for path in hub.files("datasets", "tester/digits"):  # nothing of this machine
            assert str(tmp_path).encode() not in hub.read("datasets", "tester/digits", path)


def manifest(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LocalSource(str(folder), folder, audio_root=[folder.parent])


def noise(path, seconds=1.0, rate=8000):
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * rate)), rate)
    return path


def write(source, folder, **options):
    return write_parquet(source, folder, DataArguments(dataset_name=["x"]), **options)


def test_segments_are_cut_out_and_paths_stay_here(tmp_path):
    recording = noise(tmp_path / "long.wav", 10)
    rows = [
        {"audio_filepath": str(recording), "offset": start, "duration": 1.5, "text": str(start), "raw": str(recording)}
        for start in (0, 4)
    ]
    (split,) = write(manifest(tmp_path / "data", rows), tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    table = pyarrow.parquet.read_table(file)
    assert file.name == "train-00000-of-00001.parquet" and split.seconds == 3 and set(split.rates) == {8000}
    assert table.column_names == ["audio", "duration", "text"] and table["duration"].to_pylist() == [1.5, 1.5]
    second = table["audio"][1].as_py()
    (tmp_path / "second.flac").write_bytes(second["bytes"])
    heard, rate = soundfile.read(tmp_path / "second.flac")
    whole, _ = soundfile.read(recording)
    assert second["path"] == "long_4.flac" and rate == 8000
    np.testing.assert_allclose(heard, whole[32000:44000], atol=1e-4)


def test_shards_of_any_size(tmp_path):
    rows = [{"file_name": str(noise(tmp_path / f"{i}.wav", 0.5)), "text": str(i)} for i in range(5)]
    write(manifest(tmp_path / "data", rows), tmp_path / "out", shard_bytes=1)  # less than one row
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"train-{i:05}-of-00005.parquet" for i in range(5)]
    assert [pyarrow.parquet.read_table(file)["text"][0].as_py() for file in files] == list("01234")


def test_splits_whose_columns_differ(tmp_path):
    row = {"file_name": str(noise(tmp_path / "a.wav")), "text": "x"}
    manifest(tmp_path / "data", [row | {"speaker": "anna"}])
    splits = write(manifest(tmp_path / "data", [row], "dev.jsonl"), tmp_path / "out")
    tables = [pyarrow.parquet.read_table(file) for file in sorted((tmp_path / "out").iterdir())]
    assert [split.name for split in splits] == ["train", "validation"] and tables[0].schema == tables[1].schema
    assert [table["speaker"].to_pylist() for table in tables] == [["anna"], [None]]


def test_parquet_keeps_its_types(tmp_path):
    audio = [{"bytes": noise(tmp_path / "a.wav").read_bytes(), "path": "/home/me/a.wav"}] * 2
    (tmp_path / "data").mkdir()
    table = pyarrow.table({"speech": audio, "text": ["a", "b"], "age": [31, 47], "note": [None, None]})
    pyarrow.parquet.write_table(table, tmp_path / "data/test.parquet")
    (split,) = write(LocalSource("data", tmp_path / "data"), tmp_path / "out")
    table = pyarrow.parquet.read_table(tmp_path / "out/test-00000-of-00001.parquet")
    assert split.name == "test" and table["age"].to_pylist() == [31, 47]
    assert table["speech"][0].as_py() == {"bytes": audio[0]["bytes"], "path": "a.wav"}


def test_broken_recordings_are_named_before_anything_is_uploaded(tmp_path):
    good = noise(tmp_path / "good.wav")
    (tmp_path / "short.wav").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "empty.wav").write_bytes(b"")
    names = ["good.wav", "short.wav", "empty.wav", "gone.wav", None]
    rows = [{"audio_path": name and str(tmp_path / name), "text": "x"} for name in names]
    with pytest.raises(UserError) as error:
        write(manifest(tmp_path / "data", rows, "test.jsonl"), tmp_path / "out")
    lines = str(error.value).splitlines()
    for line, words in zip(
        lines, ("row 2, short.wav: truncated", "row 3, empty.wav: 0 bytes", "row 4, gone.wav: no such file")
    ):
        assert words in line
    assert len(lines) == 5 and "row 5: no file is named" in lines[3] and "Nothing was pushed" in lines[-1]


def test_no_configuration_takes_the_folder_of_the_default_one(tmp_path):
    with pytest.raises(UserError, match="choose another name with --config"):
        push_dataset(tmp_path, "me/recordings", config="data")
