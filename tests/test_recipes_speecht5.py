"""The SpeechT5 recipes, launched as a user launches them: trained, killed, resumed, heard, and loaded by stock tools."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NANO, NANO_SPEECHT5, ROOT, environment, launch, recipe_command
from peft import PeftModel
from safetensors.torch import load_file
from test_recipes import kill_all, wait_for, weights
from transformers import SpeechT5ForTextToSpeech, SpeechT5HifiGan, SpeechT5HifiGanConfig, SpeechT5Processor, pipeline

from hfspeech.audio import decode
from hfspeech.models.speecht5 import load_speecht5_for_inference

RECIPES = ["speecht5_full", "speecht5_lora"]
SHORT = ["--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1, "--warmup_steps", 0]
SHORT += ["--per_device_train_batch_size", 4, "--report_to", "none"]


def speak(recipe, *flags, **options):
    return launch(recipe, *SHORT, *flags, **options)


@pytest.fixture(scope="module")
def uninterrupted(short_voice, tmp_path_factory):
    @functools.cache
    def run(recipe, processes=1):
        folder = tmp_path_factory.mktemp("whole") / recipe
        return folder, speak(recipe, data=short_voice, output_dir=folder, processes=processes).stdout

    return run


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, uninterrupted):
    """(recipe, output folder, printed text) of a short run of each recipe."""
    return request.param, *uninterrupted(request.param)


def test_results_hold_every_measure(finished):
    _, output_dir, printed = finished
    results = json.loads((output_dir / "run.json").read_text())
    for when in ("before", "after"):
        score = results[when]
        for measure in ("wer", "cer", "mcd", "log_f0_rmse", "speaker_similarity", "duration_ratio"):
            assert score[f"{measure}_low"] <= score[measure] <= score[f"{measure}_high"], measure
        assert sum(score["stop"].values()) == pytest.approx(1)
        assert score["ceiling"] == results["after"]["ceiling"]
        assert f"{score['mcd']:.2f} dB" in printed and f"{100 * score['wer']:.1f} %" in printed
        assert {"l1", "stop_loss", "guided"} <= score.keys()
        assert score["loss"] == pytest.approx(score["l1"] + score["stop_loss"] + score["guided"])
    log = results["train"]["log"]
    for entry in [entry for entry in log if "loss" in entry]:
        assert entry["loss"] == pytest.approx(entry["l1"] + entry["stop_loss"] + entry["guided"], abs=0.002)
    assert [entry["step"] for entry in log if "eval_cer" in entry] == [0, 2, 4]
    assert results["arguments"]["metric_for_best_model"] == "cer"
    rows = [json.loads(line) for line in (output_dir / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all({"text", "before", "after", "before_mcd", "after_mcd", "after_stop"} <= row.keys() for row in rows)


def test_there_is_something_to_listen_to(finished):
    _, output_dir, printed = finished
    folder = output_dir / "samples"
    assert str(folder) in printed
    for number in range(4):
        for kind in ("before", "after", "recording"):
            assert np.abs(decode(folder / f"{number}_{kind}.wav")).max() > 0.01
    for when in ("before", "after"):
        assert (folder / f"0_{when}.png").read_bytes().startswith(b"\x89PNG")


def test_stock_tools_load_the_model(finished):
    recipe, output_dir, printed = finished
    line = next(line for line in printed.splitlines() if "from_pretrained" in line)
    names = {"PeftModel": PeftModel, "SpeechT5ForTextToSpeech": SpeechT5ForTextToSpeech}
    exec(line.strip(), names)  # the printed line is stock code
    stock = names["model"].eval()
    if recipe == "speecht5_lora":
        assert isinstance(stock, PeftModel)
        stock = stock.merge_and_unload()
    processor = SpeechT5Processor.from_pretrained(output_dir)
    voice = load_file(output_dir / "speaker_embeddings.safetensors")["slt"]
    ids = processor(text="four two nine", return_tensors="pt").input_ids
    torch.manual_seed(0)
    spectrogram = stock.generate_speech(ids, voice[None])
    assert spectrogram.shape[1] == 80 and torch.isfinite(spectrogram).all()
    ours, _, settings, speakers = load_speecht5_for_inference(str(output_dir))
    torch.manual_seed(0)
    torch.testing.assert_close(ours.generate_speech(ids, voice[None]), spectrogram, rtol=1e-3, atol=1e-3)
    assert settings["vocoder"] == "griffin_lim" and list(speakers) == ["slt"]
    if recipe == "speecht5_full":
        config = SpeechT5HifiGanConfig(
            upsample_initial_channel=16, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]]
        )
        say = pipeline("text-to-speech", model=str(output_dir), vocoder=SpeechT5HifiGan(config), device="cpu")
        spoken = say("four two nine", forward_params={"speaker_embeddings": voice[None]})
        assert np.asarray(spoken["audio"]).size > 0


@pytest.mark.parametrize("recipe, processes", [("speecht5_lora", 1), ("speecht5_full", 2)])
def test_killed_and_resumed_equals_uninterrupted(recipe, processes, short_voice, tmp_path, uninterrupted):
    settings = {"data": short_voice, "output_dir": tmp_path / "run", "processes": processes}
    process = subprocess.Popen(
        recipe_command(recipe, *SHORT, **settings), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for(tmp_path / "run/checkpoint-2/trainer_state.json", process)
    kill_all(process)
    done = speak(recipe, **settings)
    assert "Going on from" in done.stderr
    whole, _ = uninterrupted(recipe, processes)
    resumed, expected = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "run", whole))
    assert resumed["train"]["steps"] == 4
    assert resumed["before"] == expected["before"]
    assert resumed["after"]["wer"] == expected["after"]["wer"]
    assert resumed["after"]["mcd"] == pytest.approx(expected["after"]["mcd"], rel=1e-2)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arguments_file_serves_another_dataset(recipe, short_voice, tmp_path):
    """What the README says: args.yaml with a voice of one's own, whose splits and columns are named otherwise."""
    command = [sys.executable, f"recipes/{recipe}/run.py", "--dataset_name", str(short_voice), "--language", "en"]
    command += ["--model_name_or_path", str(NANO_SPEECHT5), "--asr_model_name_or_path", str(NANO), "--max_steps", "2"]
    command += [
        "--vocoder",
        "griffin_lim",
        "--speaker_encoder",
        "mel_statistics",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command += ["--speaker_embedding_per", "dataset"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Left aside, for they describe the dataset of" in done.stderr
    if recipe == "speecht5_full":  # its new letters are in the model, and stock tools know them
        tokenizer = SpeechT5Processor.from_pretrained(tmp_path / "run").tokenizer
        assert tokenizer.unk_token_id not in tokenizer("éëïüè").input_ids
        SpeechT5ForTextToSpeech.from_pretrained(tmp_path / "run")


def test_mixed_precision_trains(short_voice, tmp_path):
    """bf16, as on every recent GPU; slow on this CPU, but the same path through accelerate."""
    done = speak("speecht5_full", "--bf16", "true", "--max_steps", 2, data=short_voice, output_dir=tmp_path / "run")
    results = json.loads((tmp_path / "run/run.json").read_text())
    assert "bf16: given" in results["choices"] and results["train"]["steps"] == 2, done.stderr[-2000:]


def test_check_looks_over_a_run(short_voice):
    command = [sys.executable, "-m", "hfspeech.cli", "check", "recipes/speecht5_lora/demo.yaml"]
    command += ["--dataset_name", str(short_voice), "--overfit", "--learning_rate", "1e-2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    for step in ("arguments", "model", "voices", "data", "audio", "batch", "silence", "loss", "memory", "time"):
        assert f"ok  {step}" in done.stdout, done.stdout + done.stderr[-3000:]
