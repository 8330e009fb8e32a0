"""Every mistake of a user ends in one sentence that says what, where and what to type next, and in exit code 2."""

import csv
import json
import logging
import os
import resource
import runpy
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import soundfile
import yaml
from conftest import NANO, NANO_SPEECHT5, NEW_DIGITS, ROOT, VOICE, environment, launch, recipe_command
from loopback_hub import LoopbackHub

from hfspeech.runs import last_checkpoint

QUICK = ["--eval_on_start", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false",
         "--max_test_samples", "2", "--dataloader_num_workers", "0", "--per_device_train_batch_size", "4",
         "--report_to", "none", "--use_cpu"]  # fmt: skip


def sentence(stderr):
    """Returns the last line of what was printed, progress bars aside; it must be the one for the user."""
    return lines(stderr)[-1]


def lines(stderr):
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.strip() and "it/s]" not in line and "s/it]" not in line]


@pytest.fixture
def refusal(capsys, monkeypatch, tmp_path):
    """Runs a recipe's own main in this process; returns the sentence with which it ends."""
    notes = logging.getLogger("hfspeech")
    before = notes.handlers, notes.propagate, notes.level
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)

    def run(*flags, recipe="whisper_lora", data=NEW_DIGITS, output_dir=tmp_path / "out", num_lines=1):
        command = recipe_command(recipe, *flags, data=data, output_dir=output_dir, launcher="python")[1:]
        if flags and str(flags[0]).endswith((".yaml", ".yml")):  # an arguments file of the test's own
            command = [command[0], *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(command[0], run_name="__main__")
        assert end.value.code == 2
        message = "\n".join(lines(capsys.readouterr().err)[-num_lines:])
        assert all(line.endswith((".", "?", "`")) for line in message.splitlines()), message
        return message

    yield run
    notes.handlers, notes.propagate = before[:2]
    notes.setLevel(before[2])


@pytest.fixture
def model_folder(tmp_path):
    """A copy of the nano Whisper to be damaged."""
    return shutil.copytree(NANO, tmp_path / "model")


# Arguments


def arguments_file(tmp_path, text=None, **settings):
    path = tmp_path / "mine.yaml"
    base = {"model_name_or_path": str(NANO), "dataset_name": str(NEW_DIGITS), "language": "en", "output_dir": "out"}
    path.write_text(yaml.safe_dump({**base, **settings}) if text is None else text)
    return path


def test_wrong_arguments_through_a_real_process(tmp_path):
    done = launch("whisper_lora", "--learning_rat", "1e-3", "--lora_rr", "4", data=NEW_DIGITS,
                  output_dir=tmp_path / "out", launcher="python", check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    first, second = lines(done.stderr)[-2:]
    assert "--learning_rat." in first and "Did you mean --learning_rate?" in first
    assert "--lora_rr." in second and "Did you mean --lora_r?" in second
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_in_the_file(refusal, tmp_path):
    message = refusal(arguments_file(tmp_path, learning_rte=1e-3))
    assert "mine.yaml" in message and "learning_rte" in message and "Did you mean learning_rate?" in message


def test_all_wrong_arguments_at_once(refusal, tmp_path):
    file = arguments_file(tmp_path, learning_rte=1e-3, max_steps="ten")
    message = refusal(file, "--batch", "4", num_lines=3)
    for words in (("mine.yaml", "learning_rte"), ("mine.yaml", "max_steps", "ten"), ("Command line", "--batch")):
        assert sum(all(word in line for word in words) for line in message.splitlines()) == 1, message


def test_a_file_that_is_not_yaml(refusal, tmp_path):
    assert "mine.yaml at line " in refusal(arguments_file(tmp_path, text="a: [1,\nb: 2\n"))
    assert "name: value" in refusal(arguments_file(tmp_path, text="just words\n"))


def test_a_file_that_is_not_there(refusal, tmp_path):
    message = refusal(tmp_path / "nowhere.yaml")
    assert "nowhere.yaml" in message and "check its path" in message


# Data


def test_a_missing_dataset_through_a_real_process(tmp_path):
    done = launch("whisper_full", data=tmp_path / "speech", output_dir=tmp_path / "out", launcher="python",
                  check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    message = sentence(done.stderr)
    assert str(tmp_path / "speech") in message and "give an existing path" in message


@pytest.mark.parametrize("meaning", ["text_column_name", "audio_column_name", "speaker_column_name", "group_columns"])
def test_a_wrong_column(refusal, meaning):
    message = refusal(f"--{meaning}", "txt")
    assert "no column txt" in message and f"--{meaning}" in message and "file_name, text, speaker" in message


def test_a_wrong_split(refusal):
    message = refusal("--test_split_name", "tests")
    assert "tests" in message and "--test_split_name" in message and "Did you mean test?" in message


def test_a_stream_without_a_length(refusal):
    assert "--max_steps" in refusal("--streaming", "--max_steps", "-1", *QUICK)


def test_a_stream_in_batches_of_seconds(refusal):
    message = refusal("--streaming", "--max_batch_seconds", "80", "--max_steps", "4", *QUICK)
    assert "--max_batch_seconds" in message and "--per_device_train_batch_size" in message


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="needs a machine without CUDA")
def test_batches_that_fill_a_gpu_where_there_is_none(refusal):
    message = refusal("--max_batch_seconds", "auto", *QUICK)
    assert "--max_batch_seconds auto" in message and "give a number of seconds" in message


# Access


def test_no_access_through_a_real_process(tmp_path):
    shutil.copytree(NANO, tmp_path / "hub/models/owner/gated")
    with LoopbackHub(tmp_path / "hub", gated=["owner/gated"]) as hub:
        done = launch(
            "whisper_lora", "--model_name_or_path", "owner/gated", data=NEW_DIGITS, output_dir=tmp_path / "out",
            launcher="python", check=False, env={**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    message = sentence(done.stderr)
    assert "owner/gated" in message and "gated" in message and "`hf auth login`" in message


# The clients of the Hub read their environment when they are imported, so these run in a process of their own.
ATTEMPTS = """
from hfspeech.arguments import DataArguments, WhisperArguments
from hfspeech.data import load_speech
from hfspeech.errors import UserError
from hfspeech.models.whisper import load_whisper
for attempt in (
    lambda: load_whisper(WhisperArguments(model_name_or_path="owner/private", language="en")),
    lambda: load_whisper(WhisperArguments(model_name_or_path="owner/missing", language="en")),
    lambda: load_speech(DataArguments(dataset_name=["owner/private"])),
):
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def attempts(env):
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 3, done.stdout
    for name, sentence in zip(("owner/private", "owner/missing", "owner/private"), sentences):
        assert name in sentence and sentence.endswith(".")
    return sentences


def test_private_and_missing_repositories(tmp_path):
    shutil.copytree(NANO, tmp_path / "hub/models/owner/private")
    shutil.copytree(NEW_DIGITS / "validation", tmp_path / "hub/datasets/owner/private")
    with LoopbackHub(tmp_path / "hub", private=["owner/private"]) as hub:
        sentences = attempts(environment(**{**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}))
    assert all("`hf auth login`" in sentence for sentence in sentences)


def test_offline_and_not_in_the_cache(tmp_path):
    first, second, third = attempts(environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)))
    assert "no copy is in the cache" in first and "no copy is in the cache" in second
    assert "HF_HUB_OFFLINE" in third


# Output folder


def test_an_output_folder_that_cannot_be_written(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(output_dir=tmp_path / "file/out")
    assert str(tmp_path / "file/out") in message and "--output_dir" in message


def test_a_full_disk_is_seen_before_training(refusal, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20))
    message = refusal()
    assert "1 MB free" in message and "--output_dir" in message


def test_an_output_folder_of_another_run(refusal, tmp_path):
    assert "--group_columns" in refusal("--group_columns", "txt", "--seed", "1")  # has claimed the folder
    record = tmp_path / "out/run.json"  # and lets it go, unless it has come to something
    record.write_text(json.dumps(json.loads(record.read_text()) | {"before": {}}))
    message = refusal("--seed", "2")
    assert str(tmp_path / "out") in message and "seed 1 there, 2 here" in message and "--output_dir" in message


def test_a_disk_that_fills_up_while_training_keeps_the_earlier_checkpoints(few_digits, tmp_path):
    out = tmp_path / "out"
    command = recipe_command(
        "whisper_full", "--max_steps", "200", "--save_steps", "1", *QUICK, "--eval_on_start", "true",
        data=few_digits, output_dir=out, launcher="python",
    )  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    try:
        until = time.time() + 120
        while last_checkpoint(out) is None and process.poll() is None and time.time() < until:
            time.sleep(0.1)
        # From here on the kernel refuses every file that grows beyond 1 MB, in the middle of a checkpoint.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, stderr
    message = sentence(stderr)
    assert str(out) in message and "free some space" in message and "same command" in message
    kept = last_checkpoint(out)
    assert kept is not None
    safetensors.torch.load_file(f"{kept}/model.safetensors")
    assert json.loads((out / "run.json").read_text())["before"]["wer"] is not None


# Language


def test_an_unknown_language(refusal):
    message = refusal("--language", "germn")
    assert "--language germn" in message and "Did you mean german?" in message


def test_a_language_that_the_model_has_no_token_for(refusal):
    message = refusal("--language", "german")
    assert "--language german" in message and "only for en" in message


def test_a_multilingual_model_without_a_language(refusal, tmp_path):
    file = arguments_file(tmp_path, language=None, output_dir=str(tmp_path / "out"))
    assert "--language" in refusal(file, "--use_cpu")


# Models


def test_a_folder_that_is_not_there(refusal, tmp_path):
    message = refusal("--model_name_or_path", tmp_path / "gone")
    assert str(tmp_path / "gone") in message and "openai/whisper-small" in message


def test_a_model_that_is_not_a_whisper(refusal, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    message = refusal("--model_name_or_path", tmp_path / "bert")
    assert "is a bert model, not a Whisper" in message and "openai/whisper-small" in message


@pytest.mark.parametrize("config", ['{"hidden_size": 8}', '{"model_type": "no_such_model"}'])
def test_a_model_of_unknown_kind(refusal, model_folder, config):
    (model_folder / "config.json").write_text(config)
    message = refusal("--model_name_or_path", model_folder)
    assert str(model_folder) in message and len(message) < 500


def test_a_folder_without_a_model(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal("--model_name_or_path", tmp_path / "empty")
    assert str(tmp_path / "empty") in message and "config.json" in message


def test_a_model_without_weights(refusal, model_folder):
    (model_folder / "model.safetensors").unlink()
    message = refusal("--model_name_or_path", model_folder)
    assert str(model_folder) in message and "whole model" in message


def test_a_model_without_a_tokenizer(refusal, model_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_folder / name).unlink()
    assert str(model_folder) in refusal("--model_name_or_path", model_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_half_written_model(refusal, model_folder, name):
    whole = (model_folder / name).read_bytes()
    (model_folder / name).write_bytes(whole[: len(whole) // 2])
    message = refusal("--model_name_or_path", model_folder)
    assert str(model_folder) in message and ("damaged" in message or "not a complete" in message)


@pytest.mark.parametrize("damage", ["half a trainer_state.json", "gone"])
def test_a_half_written_checkpoint_to_resume_from(refusal, few_digits, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint-5"
    if damage != "gone":
        shutil.copytree(NANO, checkpoint)
        (checkpoint / "optimizer.pt").write_bytes(b"")
        (checkpoint / "progress.json").write_text('{"seconds": 1, "audio_seconds": 1}')
    if damage == "half a trainer_state.json":
        (checkpoint / "trainer_state.json").write_text('{"global_step": 5, "log_hist')
    message = refusal("--resume_from_checkpoint", checkpoint, *QUICK, recipe="whisper_full", data=few_digits)
    assert f"--resume_from_checkpoint {checkpoint}" in message and "leave the flag out" in message


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="needs a machine without CUDA")
def test_quantisation_without_cuda(refusal):
    message = refusal("--load_in_8bit")
    assert "--load_in_8bit" in message and "CUDA" in message and "leave it out" in message


def test_adapter_targets_that_match_nothing(refusal):
    message = refusal("--lora_target_modules", "query")
    assert "--lora_target_modules query" in message and "q_proj" in message and "all-linear" in message


# SpeechT5


@pytest.mark.parametrize(
    "recipe, flags, message",
    [
        ("speecht5_full", ["--model_name_or_path", NANO], "is a whisper model, not a SpeechT5"),
        ("speecht5_full", ["--model_name_or_path", VOICE], "holds no config.json, so it is not a model"),
        ("speecht5_lora", ["--add_characters", "äö"], "use the recipe speecht5_full"),
        ("speecht5_full", ["--vocoder", "griffin_lin"], "Did you mean griffin_lim?"),
        ("speecht5_full", ["--asr_model_name_or_path", NANO_SPEECHT5], "not a Whisper"),
        ("speecht5_full", ["--speaker_encoder", "speechbrain/spkrec-xvect-voxceleb"], "pip install speechbrain"),
        ("speecht5_full", ["--speaker_encoder", NANO], "WavLM"),
        ("speecht5_full", ["--mos_model", "squin"], "Did you mean squim?"),
        ("speecht5_full", ["--streaming", "true"], "leave --streaming out"),
        ("speecht5_full", ["--speakers", "awb"], "has no row of --speakers awb; it has: slt"),
        ("speecht5_full", ["--speaker_embeddings_file", "voices.npy"], "There is no file voices.npy"),
        ("speecht5_full", ["--lora_r", "4"], "there is no setting --lora_r"),
        ("speecht5_full", ["--encoder_window", "auto"], "there is no setting --encoder_window"),
    ],
)
def test_speecht5_refuses_in_one_sentence(refusal, recipe, flags, message):
    assert message in refusal(*QUICK, *flags, recipe=recipe, data=VOICE)


def test_an_opinion_whose_weights_cannot_be_had(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    message = refusal("--mos_model", "squim", recipe="speecht5_full", data=VOICE)
    assert "--mos_model squim cannot be had" in message and "leave it out" in message
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_flag_without_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "hfspeech.cli", "--foo"], cwd=ROOT, env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 2
    assert sentence(done.stderr) == (
        "hfspeech: a command comes first, not --foo. Choose from check, evaluate, compare, reproduce, transcribe, "
        "synthesize, push, push-dataset."
    )


def test_long_silence_at_the_ends_is_cut_off_and_said(short_voice, tmp_path):
    data = shutil.copytree(short_voice, tmp_path / "voice")
    for path in data.rglob("*.ogg"):
        waveform, rate = soundfile.read(path)
        soundfile.write(path, np.pad(waveform, 16000), rate, format="OGG", subtype="OPUS")
    for table in data.rglob("metadata.csv"):
        rows = list(csv.DictReader(table.open(newline="")))
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "speaker"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    done = launch(
        "speecht5_lora", *QUICK, "--max_steps", "1", data=data, output_dir=tmp_path / "out", launcher="python"
    )
    assert "Silence at the ends of the recordings is cut off, 2." in done.stderr
