"""Tests of the `hfspeech` command: what it prints and writes, and what a mistake gets."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from transformers import BertConfig, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from hfspeech.audio import decode, write
from hfspeech.cli import main
from hfspeech.modeling.whisper import VariableLengthEncoder

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano_whisper"
DIGITS = ASSETS / "espeak_digits"
CLIP = DIGITS / "test" / "00000.ogg"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The nano Whisper's shape with random weights, on disk."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(NANO))
    whisper.generation_config = GenerationConfig.from_pretrained(NANO)
    whisper.save_pretrained(folder)
    WhisperProcessor.from_pretrained(NANO).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def logger_as_it_was():
    logger = logging.getLogger("hfspeech")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def command(*args):
    """Runs a command line in a process of its own."""
    line = [sys.executable, "-m", "hfspeech.cli", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_help_comes_without_loading_torch():
    code = (
        "import sys, hfspeech, hfspeech.cli\n"
        "for line in (['--help'], *([name, '--help'] for name in ('transcribe', 'evaluate', 'check', 'synthesize'))):\n"
        "    try: hfspeech.cli.main(line)\n"
        "    except SystemExit as end: assert end.code == 0, line\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("check", "evaluate", "transcribe", "synthesize", "--on_bad_audio", "--overfit", "srt", "--vocoder"):
        assert name in result.stdout


def mistakes(model, folder):
    """Command line → what its one sentence has to name."""
    (folder / "bert").mkdir()
    BertConfig().save_pretrained(folder / "bert")
    half = folder / "half"
    half.mkdir()
    for file in model.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "file").write_text("in the way")
    (folder / "empty").mkdir()
    (folder / "args.yaml").write_text(f"config_name: {NANO}\noutput_dir: {folder / 'out'}\nlearnin_rate: 1e-4\n")
    (folder / "in_the_way.yaml").write_text(f"config_name: {NANO}\noutput_dir: {folder / 'file' / 'out'}\n")
    on_digits = ["evaluate", model, "--dataset_name", DIGITS]
    return {
        "unknown command": (["transcrib", model, CLIP], "transcribe"),
        "unknown flag": (["transcribe", model, CLIP, "--formt", "srt"], "--format"),
        "unknown format": (["transcribe", model, CLIP, "--format", "doc"], "srt"),
        "bad number": (["transcribe", model, CLIP, "--batch_size", "0"], "--batch_size"),
        "no such recording": (["transcribe", model, folder / "nothing.wav"], "nothing.wav"),
        "folder without recordings": (["transcribe", model, folder / "empty"], "empty"),
        "subtitles of several": (["transcribe", model, CLIP, DIGITS / "test", "--format", "srt"], "--output_dir"),
        "two of one name": (["transcribe", model, CLIP, DIGITS / "train" / CLIP.name], "00000"),
        "unwritable folder": (["transcribe", model, CLIP, "--output_dir", folder / "file" / "x"], "--output_dir"),
        "no such model": (["transcribe", folder / "no" / "model", CLIP], "no/model"),
        "not a Whisper": (["transcribe", folder / "bert", CLIP], "not a Whisper"),
        "half-written": (["transcribe", half, CLIP], "half-written"),
        "unknown language": (["transcribe", model, CLIP, "--language", "germn"], "german"),
        "language without token": (["transcribe", model, CLIP, "--language", "german"], "german"),
        "no dataset": (["evaluate", model, "--dataset_name", folder / "no.csv"], "no.csv"),
        "dataset not given": (["evaluate", model], "--dataset_name"),
        "wrong split": ([*on_digits, "--split", "tests"], "test"),
        "wrong column": ([*on_digits, "--text_column_name", "txt"], "text"),
        "wrong group": ([*on_digits, "--group_columns", "accent"], "accent"),
        "unwritable result": ([*on_digits, "--output", folder / "file" / "r.json"], "--output"),
        "unknown key": (["check", folder / "args.yaml"], "learning_rate"),
        "no arguments file": (["check", folder / "none.yaml"], "none.yaml"),
        "output folder in the way": (["check", folder / "in_the_way.yaml"], "--output_dir"),
    }


def test_every_mistake_gets_one_sentence_and_exit_code_2(model, tmp_path, capsys):
    for name, (argv, expected) in mistakes(model, tmp_path).items():
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert end.value.code == 2, name
        assert len(lines) == 1 and expected in lines[0] and lines[0].endswith((".", "?")), (name, captured.err)
    assert not (tmp_path / "out").exists()


def test_a_broken_file_is_passed_over_and_told_at_the_end(model, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "a.ogg").write_bytes(CLIP.read_bytes())
    (tmp_path / "in" / "b.wav").write_bytes(b"not a recording")
    (tmp_path / "in" / "deeper" / "a.ogg").write_bytes(CLIP.read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("not for here")
    result = command("transcribe", model, tmp_path / "in", "--output_dir", tmp_path / "out")
    assert result.returncode == 1
    assert "b.wav" in result.stderr and "1 of 3 recordings" in result.stderr and "Traceback" not in result.stderr
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == ["a.txt", "deeper/a.txt"]


def test_transcripts_in_every_format_tell_the_same(model, tmp_path, capsys):
    clips = [decode(DIGITS / "test" / f"{i:05}.ogg") for i in range(6)]
    write(tmp_path / "long.wav", np.concatenate(clips))
    seconds = sum(map(len, clips)) / 16000
    out = {}
    for name in ("text", "json", "srt", "vtt"):
        assert main(["transcribe", str(model), str(tmp_path / "long.wav"), "--format", name]) == 0
        out[name] = capsys.readouterr().out
    result = json.loads(out["json"])
    assert result["text"] == out["text"].strip() == " ".join(s["text"] for s in result["segments"])
    assert len(result["segments"]) >= seconds / 5
    clock = r"(\d\d):(\d\d):(\d\d)[,.](\d{3})"
    for name, start in (("srt", "1\n"), ("vtt", "WEBVTT\n\n")):
        assert out[name].startswith(start)
        times = [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in re.findall(clock, out[name])]
        expected = [segment[key] for segment in result["segments"] for key in ("start_s", "end_s")]
        assert times == pytest.approx(expected, abs=0.001)
        assert times[-1] <= seconds + 0.001


def test_the_result_of_an_evaluation_follows_from_its_predictions(model, tmp_path, capsys):
    output = tmp_path / "results" / "digits.json"
    line = ["evaluate", model, "--dataset_name", DIGITS, "--group_columns", "speaker", "--max_samples", 12]
    assert main([str(word) for word in [*line, "--normalizer", "basic", "--output", output]]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    rows = [json.loads(line) for line in (tmp_path / "results" / "digits_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == result["rows"] == 12
    wer = jiwer.wer([row["text"] for row in rows], [row["prediction"] for row in rows])
    assert result["wer"] == pytest.approx(wer)
    assert f"{100 * wer:.1f} %" in printed
    assert set(result["groups"]["speaker"]) == {row["speaker"] for row in rows}
    assert result["model"] == str(model) and result["split"] == "test"
    assert result["arguments"]["max_samples"] == 12 and "torch" in result["environment"]["versions"]


def frames_of(argv, monkeypatch):
    """Runs a command line and returns how many frames its encoder was given in each batch."""
    frames, original = [], VariableLengthEncoder.forward
    monkeypatch.setattr(
        VariableLengthEncoder, "forward",
        lambda self, features, *args, **kwargs: frames.append(features.shape[-1]) or original(self, features),
    )  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return frames


@pytest.mark.parametrize("flags, is_full", [([], True), (["--encoder_window", "auto"], False)])
def test_evaluation_is_padded_unless_asked_otherwise(model, tmp_path, monkeypatch, capsys, flags, is_full):
    """Also of a model that was tuned unpadded: the figure is what any other tool finds."""
    tuned = copy_of(model, tmp_path, encoder_window="auto")
    argv = ["evaluate", tuned, "--dataset_name", DIGITS, "--max_samples", 4, "--output", tmp_path / "r.json"]
    frames = frames_of([*argv, *flags], monkeypatch)
    assert (set(frames) == {250}) is is_full
    score = json.loads((tmp_path / "r.json").read_text())
    assert score["unfinished"] == 4, "random weights never end a text"
    assert "4 rows were cut off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tuned, flags, is_full",
    [
        (None, [], True),
        ("full", [], True),
        ("auto", [], False),
        ("auto", ["--encoder_window", "full"], True),
        (None, ["--encoder_window", "auto"], False),
    ],
)
def test_a_transcript_is_made_as_the_model_was_trained(model, tmp_path, monkeypatch, tuned, flags, is_full):
    model = copy_of(model, tmp_path, encoder_window=tuned) if tuned else model
    assert (frames_of(["transcribe", model, CLIP, *flags], monkeypatch) == [250]) is is_full


def copy_of(model, folder, **settings):
    """Copies a model with other settings in its generation config."""
    copy = shutil.copytree(model, folder / "tuned")
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**generation, **settings}))
    return copy


def check(tmp_path, capsys, *flags):
    """Runs `hfspeech check` on the nano recipe with the digits and returns (exit code, stdout, stderr)."""
    arguments_file = tmp_path / "args.yaml"
    arguments_file.write_text(
        f"config_name: {NANO}\nlanguage: english\ndataset_name: {DIGITS}\noutput_dir: {tmp_path / 'run'}\n"
        "max_steps: 100\nper_device_train_batch_size: 4\nper_device_eval_batch_size: 4\ndataloader_num_workers: 0\n"
        "learning_rate: 3e-3\nnormalizer: basic\nmax_train_samples: 60\n"
    )
    try:
        code = main(["check", str(arguments_file), *flags])
    except SystemExit as end:
        code = end.code
    assert [p.name for p in tmp_path.iterdir()] == ["args.yaml"], "a check leaves nothing behind"
    return (code, *capsys.readouterr())


def test_check_goes_through_every_step_and_shows_what_the_decoder_sees(tmp_path, capsys):
    code, out, err = check(tmp_path, capsys, "--overfit")
    assert code == 0, err
    steps = re.findall(r"^ok  (\w+)", out, re.MULTILINE)
    assert steps == "arguments output model data audio batch labels loss memory time overfit".split()
    reads = re.findall(r"reads +(.*)", out)
    writes = re.findall(r"writes +(.*)", out)
    prefix = "<|en|><|transcribe|><|notimestamps|>"
    assert reads and all(line.startswith("<|startoftranscript|>" + prefix) for line in reads)
    assert all(line.startswith(prefix) and line.endswith("<|endoftext|>") for line in writes)
    assert all(read.removeprefix("<|startoftranscript|>") + "<|endoftext|>" == w for read, w in zip(reads, writes))
    loss = float(re.search(r"([\d.]+) at step 0", out)[1])
    assert loss == pytest.approx(np.log(555), abs=0.7), "random weights guess among the 555 tokens"
    assert "100 steps of 4 rows" in out


def test_check_tells_when_a_batch_cannot_be_learnt(tmp_path, capsys):
    code, out, err = check(tmp_path, capsys, "--overfit", "--learning_rate", "1e-7", "--lora_r", "4")
    assert code == 2
    assert "LoRA" in out and "ok  overfit" not in out
    assert "--learning_rate" in err.strip().splitlines()[-1]


def test_check_looks_over_batches_of_seconds_and_a_frozen_encoder(tmp_path, capsys):
    code, out, err = check(
        tmp_path, capsys, "--max_batch_seconds", "40", "--freeze_encoder", "--encoder_window", "full"
    )
    assert code == 0, err
    rows, frames = map(int, re.search(r"features (\d+)×80×(\d+)", out).groups())
    assert rows > 4 and rows * frames * 0.02 <= 40.5
    assert f"100 steps of {rows} rows" in out
