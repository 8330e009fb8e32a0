"""Whatever a file holds, reading it ends in rows or in one sentence: never in a traceback, a hang or gigabytes.

Each run draws the same cases. `FUZZ_CASES=100000 pytest tests/test_fuzz.py` draws as many new ones for each test, and
prints how to draw a failing one again.
"""

import contextlib
import csv
import dataclasses
import datetime
import faulthandler
import functools
import io
import json
import os
import resource
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torchaudio  # noqa: F401  (before memory is bounded)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfspeech.arguments import (
    DataArguments,
    LoraArguments,
    SpeechT5Arguments,
    SpeechT5TrainingArguments,
    WhisperArguments,
    WhisperTrainingArguments,
    parse_arguments,
    read_arguments_file,
)
from hfspeech.audio import BadAudio, decode, duration_s, sampling_rate_of
from hfspeech.data import load_split
from hfspeech.errors import UserError
from hfspeech.runs import peak_rss_bytes

CASES = int(os.environ.get("FUZZ_CASES", 0))
SECONDS_A_CASE = 10
MEMORY = 1 << 30  # that a test may take beyond what the process has


def cases(number):
    """Sets how many cases a test draws: `number` in the suite, `FUZZ_CASES` where that is set."""
    return settings(
        max_examples=CASES or number,
        derandomize=not CASES,
        deadline=1000 * SECONDS_A_CASE,
        database=None,
        print_blob=bool(CASES),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def bounds(monkeypatch, tmp_path):
    """Ends the process if a test hangs; undoes what settings write into the environment."""
    environ, most = dict(os.environ), peak_rss_bytes()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    faulthandler.dump_traceback_later(300 + CASES, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.environ.clear()
    os.environ.update(environ)
    assert peak_rss_bytes() < most + MEMORY


@pytest.fixture
def little_memory():
    """Refuses gigabytes to whoever asks for them, before the machine runs out of them."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# Audio

FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
           ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("CAF", "PCM_16"),
           ("AU", "PCM_16"), ("WAVEX", "PCM_24")]  # fmt: skip


@functools.cache
def recordings():
    """A tenth of a second of noise in every format, mono and stereo."""
    waveform = 0.1 * np.random.default_rng(0).normal(size=(1600, 2))
    found = []
    for format, subtype in FORMATS:
        for channels in (1, 2):
            file = io.BytesIO()
            soundfile.write(file, waveform[:, :channels], 16000, format=format, subtype=subtype)
            found.append(file.getvalue())
    return found


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 255, 256, 0x7FFF, 0xFFFF, 44101, 384_000, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["byte", "little", "big", "wide", "cut", "insert", "drop"]),
        st.one_of(st.integers(0, 64), st.integers(0, 4000)),
        st.one_of(NUMBERS, st.integers(0, 0xFFFFFFFF)),
    ),
    max_size=4,
)


def changed(content, changes):
    content = bytearray(content)
    for kind, place, value in changes:
        place = min(place, len(content))
        if kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + value % 64]
        elif kind == "insert":
            content[place:place] = value.to_bytes(4, "little") * (1 + value % 5)
        else:
            new = {"byte": struct.pack("B", value & 255), "little": struct.pack("<I", value),
                   "big": struct.pack(">I", value), "wide": struct.pack("<Q", value << 16)}[kind]  # fmt: skip
            content[place : place + len(new)] = new[: len(content) - place]
    return bytes(content)


def listen(audio):
    """Asks all that is ever asked of a recording."""
    for ask in (decode, duration_s, sampling_rate_of):
        with contextlib.suppress(BadAudio, UserError):
            found = ask(audio)
            if ask is decode:
                assert found.dtype == np.float32 and found.ndim == 1 and len(found) and np.isfinite(found).all()
            elif ask is duration_s:
                assert 0 < found < float("inf")
    with contextlib.suppress(BadAudio, UserError):
        assert len(decode(audio, offset_s=0.02, num_s=0.05))


@cases(700)
@given(st.integers(0, 2 * len(FORMATS) - 1), CHANGES)
def test_recordings_with_changes(little_memory, number, changes):
    listen(changed(recordings()[number], changes))


@cases(200)
@given(st.binary(max_size=200), st.sampled_from([b"", b"RIFF\x24\0\0\0WAVEfmt ", b"fLaC\0\0\0\x22", b"OggS\0\2", b"ID3\4\0\0",
       b"\xff\xfb\x90\x64", b"FORM", b"caff", b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3", b"#EXTM3U\n/etc/passwd\n"]))  # fmt: skip
def test_any_bytes(little_memory, content, start):
    listen(start + content)


# Arguments

RECIPES = [
    (DataArguments, WhisperArguments, LoraArguments, WhisperTrainingArguments),
    (DataArguments, SpeechT5Arguments, SpeechT5TrainingArguments),
]
NAMES = sorted({field.name for types in RECIPES for kind in types for field in dataclasses.fields(kind) if field.init})
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5),
    st.sampled_from(["", "no", "null", "1e999", "nan", "-1", "{}", "[", '{"a": {"b": 1}}', "9" * 5000, "x" * 10000, "\0", "--", "a=b"]),
)  # fmt: skip
NESTED = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3), max_leaves=5)  # fmt: skip
PIECES = st.sampled_from(
    ["a: b\n", "a: &x [1, 2]\n", "b: *x\n", "&a ", "*a", "!!python/object/apply:os.system [id]\n", "!!python/name:os.system ",
     "!!binary x\n", "!!int 1_0\n", "!!set {a}\n", "<<: *x\n", "? ", ": ", "- ", "[", "{", "}", "]", "|\n", ">\n", "%YAML 9.9\n",
     "---\n", "...\n", "\t", "\ufeff", "\x00", "\x85", "2001-99-99\n", "0x", "0o9", "1:99:99", ".inf", "~", "\"\\ud800\"", "#", "9" * 5000,
     "[" * 2000, "max_steps: ", "output_dir: ", "dataset_name: "]
)  # fmt: skip


@pytest.fixture(scope="module")
def settings_of_a_run(tmp_path_factory):
    return {
        "model_name_or_path": "a/b",
        "dataset_name": ["x"],
        "output_dir": str(tmp_path_factory.mktemp("out")),
        "use_cpu": True,
    }


@cases(400)
@given(st.sampled_from(RECIPES), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), NESTED, max_size=4),
       st.lists(st.sampled_from([f"--{name}" for name in NAMES]) | st.text(max_size=8), max_size=4))  # fmt: skip
def test_settings_and_flags(settings_of_a_run, types, settings, flags):
    with contextlib.suppress(UserError):
        parse_arguments({**settings_of_a_run, **settings}, flags, types)


@cases(400)
@given(st.one_of(st.lists(PIECES | st.text(max_size=10), max_size=12).map(lambda pieces: "".join(pieces).encode("utf-8", "replace")),
                 st.binary(max_size=100)))  # fmt: skip
def test_arguments_files(little_memory, settings_of_a_run, content):
    path = Path(settings_of_a_run["output_dir"], "args.yaml")
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        settings = read_arguments_file(path)
        parse_arguments({**settings_of_a_run, **settings}, [], RECIPES[0])


# Manifests

COLUMNS = [
    "file_name",
    "audio",
    "path",
    "text",
    "sentence",
    "id",
    "speaker",
    "duration",
    "offset",
    "split",
    "",
    "\0",
    "ü" * 300,
]
NAMED = ["good.flac", "sub/good.flac", "missing.wav", "text.csv", "pipe", "sub", "", ".", "..", "/", "\0", "a" * 5000, "\ud800",
         "../secret.flac", "sub/../../secret.flac", "link.flac", "linked/secret.flac", "~/secret.flac", "//secret.flac",
         "file:../secret.flac", "http://127.0.0.1:9/x.flac", "hf://datasets/a/b/x.flac", "zip://x.flac::http://127.0.0.1:9/x.zip"]  # fmt: skip
CELLS = st.one_of(
    st.sampled_from(NAMED), st.text(max_size=15), st.none(), st.integers(), st.floats(), st.booleans(), st.just("x" * 100_000),
    st.sampled_from(["0", "0.1", "-1", "nan", "inf", "1e400", "train", "test", "dev", '"', "'", "\t", "\n", "\r", ",", "\x1a", "٣"]),
    st.recursive(st.none() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4),
)  # fmt: skip
TABLES = st.lists(st.sampled_from(COLUMNS[:10]) | st.sampled_from(COLUMNS), max_size=5).flatmap(
    lambda columns: st.tuples(st.just(["file_name", "text", *columns]),
                              st.lists(st.lists(CELLS, max_size=len(columns) + 3), max_size=3)))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with recordings of 0.1 s, beside one of 0.2 s that nothing in it may lead to."""
    outside = tmp_path_factory.mktemp("outside")
    inside = outside / "inside"
    (inside / "sub").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(0).normal(size=3200)
    soundfile.write(outside / "secret.flac", noise, 16000)
    soundfile.write(inside / "good.flac", noise[:1600], 16000)
    soundfile.write(inside / "sub/good.flac", noise[:1600], 16000)
    (inside / "text.csv").write_text("file_name,text")
    (inside / "link.flac").symlink_to(outside / "secret.flac")
    (inside / "linked").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    return inside


def load(path, on_bad_audio="skip"):
    """Loads a manifest and looks at its first rows; they lie in its folder."""
    with contextlib.suppress(UserError):
        data_args = DataArguments(dataset_name=[str(path)], on_bad_audio=on_bad_audio, min_duration_in_seconds=0)
        rows = load_split(data_args, "test")
        assert len(rows)
        for i in range(min(3, len(rows))):
            waveform = rows[i]["waveform"]
            assert waveform is None or len(waveform) <= 1600


def as_text(suffix, columns, rows):
    if suffix == ".jsonl":
        return "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows)
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", escapechar="\\")
    writer.writerows([columns, *rows])
    return file.getvalue()


@cases(500)
@given(st.sampled_from([".csv", ".tsv", ".jsonl"]), TABLES, st.just([]) | CHANGES,
       st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), st.sampled_from(["skip", "error"]))  # fmt: skip
def test_manifests(folder, suffix, table, changes, encoding, on_bad_audio):
    path = folder / f"rows{suffix}"
    path.write_bytes(changed(as_text(suffix, *table).encode(encoding, "replace"), changes))
    load(path, on_bad_audio)


@cases(100)
@given(st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
       | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'"' * 1000, b",\n" * 1000, b"\0" * 100, b"\xef\xbb\xbf", b"file_name,text\n" + b'"' * 1000]))  # fmt: skip
def test_manifests_of_any_bytes(folder, suffix, content):
    path = folder / f"any{suffix}"
    path.write_bytes(content)
    load(path)


ARRAYS = st.one_of(
    st.lists(st.sampled_from(NAMED[:-1]) | st.none(), min_size=2, max_size=2),
    st.lists(st.integers(-9, 9) | st.none(), min_size=2, max_size=2),
    st.lists(st.floats() | st.none(), min_size=2, max_size=2),
    st.lists(st.binary(max_size=5) | st.none(), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=2, max_size=2),
    st.lists(st.dates(), min_size=2, max_size=2),
    st.lists(
        st.none() | st.fixed_dictionaries({"bytes": st.none() | st.binary(max_size=50) | st.just(b"fLaC"),
                                           "path": st.sampled_from(NAMED) | st.none()}), min_size=2, max_size=2),
)  # fmt: skip
TYPES = [
    "Audio",
    "Image",
    "Video",
    "Value",
    "ClassLabel",
    "Sequence",
    "List",
    "Translation",
    "Array2D",
    "Pdf",
    "Json",
    "Evil",
    "",
]


@cases(150)
@given(st.lists(st.sampled_from(COLUMNS), max_size=4), st.lists(ARRAYS, min_size=6, max_size=6),
       st.none() | st.dictionaries(st.sampled_from(["audio", "text", "path"]), st.sampled_from(TYPES), max_size=2), CHANGES | st.just([]))  # fmt: skip
def test_parquet(folder, columns, values, types, changes):
    names = list(dict.fromkeys(["audio", "text", *columns]))
    try:
        table = pyarrow.table({name: pyarrow.array(array) for name, array in zip(names, values)})
    except (UnicodeEncodeError, pyarrow.ArrowInvalid):
        return
    if types is not None:
        features = {name: {"_type": kind} for name, kind in types.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    path = folder / "rows.parquet"
    path.write_bytes(changed(file.getvalue(), changes))
    load(path)


# What such cases have found, each once more


def wav(rate):
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).normal(size=1600), 16000, format="WAV")
    return file.getvalue()[:24] + struct.pack("<I", rate) + file.getvalue()[28:]


@pytest.mark.parametrize("rate", [0, 1, 999, 384_001, 1 << 20, (1 << 31) - 1])
def test_a_rate_that_no_recording_has(little_memory, rate):
    for ask in (decode, duration_s, sampling_rate_of):
        with pytest.raises(BadAudio):
            ask(wav(rate))


@pytest.mark.parametrize("rate", [1009, 15_991, 22_254, 44_101, 47_952, 383_987])
def test_odd_rates_cost_no_gigabytes(little_memory, rate):
    assert len(decode(wav(rate))) == pytest.approx(1600 * 16000 / rate, rel=1e-3, abs=1)


def test_a_flac_of_unknown_length_without_samples():
    content = bytearray(recordings()[6])
    content[21:26] = bytes(5)
    content[21] = recordings()[6][21] & 0xF0
    assert duration_s(bytes(content)) == pytest.approx(0.1)
    header = content[: content.index(b"\xff\xf8")]
    for ask in (decode, duration_s):
        with pytest.raises(BadAudio):
            ask(bytes(header))


def test_a_header_that_points_before_the_beginning_prints_nothing(capfd):
    for number in range(len(recordings())):
        for place in range(0, 64, 4):
            for value in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
                listen(changed(recordings()[number], [("little", place, value), ("big", place + 4, value)]))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("suffix, content, message", [
    (".csv", b"file_name,text\na\0b.flac,x\n", "no such file"),
    (".csv", b"\0,text\nx,y\n", "cannot be read as csv"),
    (".csv", b"file_name,text\ngood.flac,one, two\n", "more cells than its first line names columns"),
    (".jsonl", b'{"file_name": "\xff"}\n', "cannot be read as jsonl"),
    (".jsonl", '{"file_name": "good.flac"}'.encode("utf-16"), "cannot be read as jsonl"),
    (".jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not a JSON object"),
    (".jsonl", b'{"text": "\\ud800", "file_name": "good.flac"}', "cannot be read as jsonl"),
    (".jsonl", b'{"text": "x", "file_name": null, "duration": 1}', "neither bytes nor a path"),
    (".parquet", b"", "cannot be read as parquet"),
    (".parquet", b"PAR1" + bytes(100), "cannot be read as parquet"),
])  # fmt: skip
def test_manifests_that_cannot_be_read(folder, suffix, content, message):
    path = folder / f"found{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_split(DataArguments(dataset_name=[str(path)]), "test")


@pytest.mark.parametrize("content", [
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", b"a: \xff\n", b"a: " + b"9" * 5000, b"[" * 2000, b"a: 2001-99-99\n",
    b"a: !!python/object/apply:os.system [id]\n", b"a: \0\n",
], ids=["references", "encoding", "digits", "brackets", "date", "python", "nul"])  # fmt: skip
def test_arguments_files_that_cannot_be_read(tmp_path, content):
    (tmp_path / "args.yaml").write_bytes(content)
    with pytest.raises(UserError, match="is not valid YAML: write one `name: value` on each line"):
        read_arguments_file(tmp_path / "args.yaml")


@pytest.mark.parametrize("value", [{"": datetime.date(2000, 1, 1)}, False, "[", {"a": {"b": b"c"}}])
def test_a_setting_that_transformers_cannot_take(settings_of_a_run, value):
    with pytest.raises(UserError, match="^the arguments file: "):
        parse_arguments({**settings_of_a_run, "accelerator_config": value}, [], RECIPES[0])
