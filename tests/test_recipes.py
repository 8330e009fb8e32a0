"""Every recipe, launched as a user launches it: trained, killed, resumed, stopped, and loaded by stock tools."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import NANO, NEW_DIGITS, ROOT, environment, launch, recipe_command
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor, pipeline

from hfspeech.audio import decode
from hfspeech.runs import last_checkpoint

RECIPES = ["whisper_full", "whisper_lora"]  # test_recipes_speecht5.py has the others
SHORT = ["--max_steps", 6, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1, "--warmup_steps", 0]
SHORT += ["--per_device_train_batch_size", 4, "--group_columns", "speaker", "--report_to", "none"]
SHORT += ["--encoder_window", "auto", "--full_window_share", 0.25]
SHORT += ["--max_test_samples", 20]  # the eight test rows, and so many of the old condition


def test_every_recipe_is_launched_somewhere():
    found = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/run.py"))
    assert found == sorted([*RECIPES, "speecht5_full", "speecht5_lora"])


@pytest.fixture(scope="module")
def uninterrupted(few_digits, tmp_path_factory):
    """Gives the output folder and the printed text of a short run of a recipe, which is made once."""

    @functools.cache
    def run(recipe, processes):
        folder = tmp_path_factory.mktemp("whole") / recipe
        flags = [*SHORT, "--report_to", "tensorboard"]
        return folder, launch(recipe, *flags, data=few_digits, output_dir=folder, processes=processes).stdout

    return run


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, uninterrupted):
    """(recipe, output folder, printed text) of a short run of each recipe."""
    return request.param, *uninterrupted(request.param, processes=1)


def test_results_hold_everything_printed(finished):
    _, output_dir, printed = finished
    results = json.loads((output_dir / "run.json").read_text())
    for when in ("before", "after"):
        assert {"wer", "wer_low", "wer_high", "cer", "groups"} <= results[when].keys()
        assert results[when]["wer_low"] <= results[when]["wer"] <= results[when]["wer_high"]
        assert f"{100 * results[when]['wer']:.1f} %" in printed
        for speaker, rates in results[when]["groups"]["speaker"].items():
            assert speaker in printed and rates["rows"] > 0
        assert results["retention"][when]["rows"] == 20
        assert f"{100 * results['retention'][when]['wer']:.1f} %" in printed
        assert results[when]["unfinished"] == 0
    assert "unpadded" not in results["before"] and results["after"]["unpadded"]["rows"] == 8
    assert results["retention"]["after"]["unpadded"]["rows"] == 20
    train = results["train"]
    assert train["steps"] == 6
    assert train["audio_seconds_per_second"] == pytest.approx(train["audio_seconds"] / train["seconds"])
    assert train["peak_rss_bytes"] > 100e6
    assert {"train": 24, "validation": 6, "test": 8}.items() <= results["rows"].items()
    assert results["environment"]["versions"]["transformers"] and results["environment"]["date"]
    assert results["environment"]["command"].startswith("accelerate launch recipes/")
    assert results["arguments"]["max_steps"] == 6
    assert [entry["step"] for entry in train["log"] if "eval_wer" in entry] == [0, 2, 4, 6]


def test_predictions_hold_each_test_row(finished):
    _, output_dir, printed = finished
    rows = [json.loads(line) for line in (output_dir / "predictions.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["set"] == "test"]
    assert len(test) == 8 and len(rows) == 28
    assert all({"text", "before", "after", "speaker", "id"} <= row.keys() for row in test)
    assert sum(f"reference  {row['text']}" in printed for row in test) == 8


def test_logs_to_tensorboard(finished):
    _, output_dir, _ = finished
    assert list((output_dir / "runs").rglob("events.out.tfevents*"))


def test_stock_tools_load_the_model(finished):
    """transformers, peft and the pipeline load what was saved and write what the run wrote."""
    recipe, output_dir, printed = finished
    if recipe == "whisper_lora":
        model = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(NANO), output_dir)
        assert any("lora" in name for name, _ in AutoPeftModel.from_pretrained(output_dir).named_parameters())
        # The printed line is that code, with these very paths.
        line = next(line for line in printed.splitlines() if "from_pretrained" in line)
        names = {"PeftModel": PeftModel, "WhisperForConditionalGeneration": WhisperForConditionalGeneration}
        exec(line.strip(), names)
        assert isinstance(names["model"], PeftModel)
    else:
        model = WhisperForConditionalGeneration.from_pretrained(output_dir)
        assert model.config.architectures == ["WhisperForConditionalGeneration"]
    assert GenerationConfig.from_pretrained(output_dir).encoder_window == "auto"  # told to whoever knows it
    processor = WhisperProcessor.from_pretrained(output_dir)
    recognise = pipeline("automatic-speech-recognition", model=str(output_dir), device="cpu")

    rows = [json.loads(line) for line in (output_dir / "predictions.jsonl").read_text().splitlines()]
    audio = {path.name: path for path in (NEW_DIGITS / "test").glob("*.ogg")}
    for row in [row for row in rows if row["set"] == "test"][:3]:
        waveform = decode(audio[Path(row["id"]).name])
        features = processor(waveform, sampling_rate=16000, return_tensors="pt").input_features
        tokens = model.eval().generate(input_features=features)
        assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == row["after"]
        # The pipeline searches with five beams of its own accord; the run decodes greedily.
        heard = recognise({"raw": waveform, "sampling_rate": 16000}, generate_kwargs={"num_beams": 1})
        assert heard["text"].strip() == row["after"]


def weights(output_dir):
    name = "adapter_model.safetensors" if (output_dir / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(output_dir / name)


@pytest.mark.parametrize("recipe, processes", [("whisper_lora", 1), ("whisper_full", 2)])
def test_killed_and_resumed_equals_uninterrupted(recipe, processes, few_digits, tmp_path, uninterrupted):
    """SIGKILL after a checkpoint, one checkpoint left half-written; the same command goes on to the same weights."""
    settings = {"data": few_digits, "output_dir": tmp_path / "run", "processes": processes}
    command = recipe_command(recipe, *SHORT, **settings)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    wait_for(tmp_path / "run/checkpoint-2/trainer_state.json", process)
    kill_all(process)
    broken = tmp_path / "run/checkpoint-1000"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": 10')

    done = launch(recipe, *SHORT, **settings)
    assert "Going on from" in done.stderr and "half-written" in done.stderr
    assert not broken.exists()
    whole, _ = uninterrupted(recipe, processes)
    resumed = json.loads((tmp_path / "run/run.json").read_text())
    expected = json.loads((whole / "run.json").read_text())
    assert resumed["state"] == expected["state"] == "finished"
    assert resumed["train"]["steps"] == 6
    assert resumed["train"]["audio_seconds"] == pytest.approx(expected["train"]["audio_seconds"])
    assert resumed["before"] == expected["before"]
    assert resumed["after"] == expected["after"]
    # Each row keeps its own before, which the killed launch wrote, beside its after.
    assert (tmp_path / "run/predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        [entry["loss"] for entry in resumed["train"]["log"] if "loss" in entry],
        [entry["loss"] for entry in expected["train"]["log"] if "loss" in entry],
        rtol=1e-3,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arguments_file_serves_another_dataset(recipe, few_digits, tmp_path):
    """What the README says: args.yaml with a dataset of one's own, whose splits and columns are named otherwise."""
    command = [sys.executable, f"recipes/{recipe}/run.py", "--dataset_name", str(few_digits), "--language", "english"]
    command += ["--model_name_or_path", str(NANO), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Left aside, for they describe the dataset of" in done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["rows"]["test"] == 8


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(number, exit_code, few_digits, tmp_path):
    """As a terminal and a cluster send it: to the dataloader's workers, too."""
    flags = [*SHORT, "--max_steps", 500, "--eval_steps", 50, "--save_steps", 50]
    command = recipe_command("whisper_lora", *flags, data=few_digits, output_dir=tmp_path / "run", launcher="python")
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    wait_for(tmp_path / "run/checkpoint-50/trainer_state.json", process)  # it trains now
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == exit_code
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in stderr
    assert "Run the same command again to go on." in stderr
    step = int(re.search(r"Stopped at step (\d+)", stderr)[1])
    assert 50 <= step < 500
    state = json.loads((tmp_path / f"run/checkpoint-{step}/trainer_state.json").read_text())
    assert state["global_step"] == step
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / f"run/checkpoint-{step}")


def wait_for(path, process, seconds=180):
    deadline = time.time() + seconds
    while not path.exists():
        if process.poll() is not None or time.time() > deadline:
            pytest.fail(f"{path} did not come")
        time.sleep(0.02)


def kill_all(process):
    """SIGKILLs a launcher and everything that it started; torch gives each process a session of its own."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.wait()
