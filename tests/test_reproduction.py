"""Numbers that come out again: the same weights of the same seed, a recorded run made once more, records as arguments."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import NANO, NANO_SPEECHT5, ROOT, environment, launch
from loopback_hub import LoopbackHub
from test_recipes import kill_all, wait_for
from test_training import make_trainer
from transformers import set_seed

from hfspeech import runs
from hfspeech.arguments import DataArguments, SpeechT5Arguments, SpeechT5TrainingArguments, default_num_workers
from hfspeech.batching import SpeechT5Collator
from hfspeech.cli import main
from hfspeech.data import load_speech
from hfspeech.errors import EXIT_CODES, UserError, _terminate
from hfspeech.models.speecht5 import load_speecht5
from hfspeech.models.vocoders import load_vocoder
from hfspeech.reproduction import (
    _command,
    _launch,
    differences_of_material,
    environment_text,
    reproduce,
    settings_of,
)
from hfspeech.training.speecht5 import SpeechT5Trainer
from hfspeech.voices import find_voices, load_speaker_encoder

SHORT = ["--max_steps", 6, "--eval_steps", 2, "--save_steps", 2, "--per_device_train_batch_size", 4]
LORA = ROOT / "recipes/whisper_lora/run.py"
def of_old(record):
    """Takes out of a record what older ones lack: where its settings come from, fingerprints, and more."""
    for name in ("recipe", "sources", "chosen", "timings", "models", "weights", "state"):
        record.pop(name, None)
    for name in ("dirty", "sharding"):
        record["environment"].pop(name, None)
    record["environment"]["hardware"].pop("memory_bytes", None)
    for holder in (record["model"], *record["rows"]["account"]["splits"].values()):
        holder.pop("fingerprint", None)
    return record


DEMO = of_old(json.loads((ROOT / "recipes/whisper_lora/demo.json").read_text()))
COMMIT = DEMO["environment"]["commit"][:12]


# Same seed, same machine, same weights


def test_whisper_learns_the_same_bits_twice(few_digits, tmp_path):
    """Full fine-tuning with SpecAugment, speeds drawn at random and rows decoded in one or two other processes."""
    for name, workers in (("one", 1), ("two", 2)):
        trainer = make_trainer(
            few_digits, tmp_path / name, lora=False, speeds=[0.9, 1.0, 1.1], dataloader_num_workers=workers,
            model_changes={"apply_spec_augment": True, "dropout": 0.1},
        )  # fmt: skip
        trainer.train_or_resume()
        trainer.save_model()
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (NANO / "model.safetensors").read_bytes()


def test_speecht5_learns_the_same_bits_twice(short_voice, tmp_path):
    model_args = SpeechT5Arguments(model_name_or_path=str(NANO_SPEECHT5), speaker_encoder="mel_statistics")
    for name in ("one", "two"):
        args = SpeechT5TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=3, per_device_train_batch_size=4, dataloader_num_workers=1,
            eval_strategy="no", eval_on_start=False, save_strategy="no", report_to=["none"],
        )  # fmt: skip
        set_seed(args.seed)
        model, processor, front_end = load_speecht5(model_args)
        speech = load_speech(DataArguments(dataset_name=[str(short_voice)]), processor, args.seed, 200, front_end)
        voices = find_voices(speech, model_args, load_speaker_encoder("mel_statistics"))
        trainer = SpeechT5Trainer(
            model, args, speech["train"], speech["validation"],
            SpeechT5Collator(processor, front_end, voices, model.config), None, processor, load_vocoder("griffin_lim"),
        )  # fmt: skip
        trainer.train_or_resume()
        trainer.save_model()
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (NANO_SPEECHT5 / "model.safetensors").read_bytes()


# A recorded run once more


@pytest.fixture(scope="module")
def finished(few_digits, tmp_path_factory):
    """The output folder of a short LoRA run, augmented as the demo is."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    launch("whisper_lora", *SHORT, "--max_test_samples", 8, data=few_digits, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def reproduced(finished):
    """The finished process of a reproduction that was killed on its way and started again by the same command."""
    command = [sys.executable, "-m", "hfspeech.cli", "reproduce", str(finished)]
    folder = finished.with_name("run_reproduced")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(folder / "checkpoint-2/trainer_state.json", process)
    kill_all(process)
    return subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300)


def test_a_reproduction_has_the_same_bits(finished, reproduced):
    assert reproduced.returncode == 0, reproduced.stderr[-3000:]
    assert "Reproduced: every figure is equal to the digit." in reproduced.stdout
    assert "The environment is that of the record." in reproduced.stdout
    new = finished.with_name("run_reproduced")
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (finished, new)]
    assert weights[0] == weights[1]
    old, now = (json.loads((folder / "run.json").read_text()) for folder in (finished, new))
    assert old["after"] == now["after"] and old["recipe"] == now["recipe"] == "recipes/whisper_lora/run.py"
    assert now["sources"]["max_steps"] == str(new / "args.yaml")
    assert now["timings"]["total"] > sum(now["timings"][name] for name in ("load", "before", "train"))


def test_an_altered_record_is_not_reproduced(finished, reproduced, tmp_path, capfd):
    record = json.loads((finished / "run.json").read_text())
    record["after"] |= {"wer": 0.0, "wer_low": 0.0, "wer_high": 0.0001}
    record["rows"]["account"]["splits"]["test"]["fingerprint"] = "sha256:other"
    (tmp_path / "record.json").write_text(json.dumps(record))
    output_dir = finished.with_name("run_reproduced")  # it is finished, so it is only measured again
    assert main(["reproduce", str(tmp_path / "record.json"), "--output_dir", str(output_dir)]) == 1
    printed = capfd.readouterr().out
    assert "Not reproduced: test: WER is outside the interval." in printed
    assert "The test rows are not those of the record." in printed
    assert "test: CER" in printed and "equal to the digit" in printed


def test_a_run_fetched_from_the_hub(finished, tmp_path):
    target = tmp_path / "hub/models/acme/run"
    target.mkdir(parents=True)
    record = json.loads((finished / "run.json").read_text())
    record["arguments"]["audio_root"] = ["/"]
    (target / "run.json").write_text(json.dumps(record))
    (tmp_path / "hub/models/acme/bare").mkdir()
    (tmp_path / "hub/models/acme/bare/config.json").write_text("{}")
    with LoopbackHub(tmp_path / "hub") as hub:
        env = {**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        code = "from hfspeech.cli import main; print('code', main(['reproduce', 'acme/run', '--dry_run']))"
        code += "\nmain(['reproduce', 'acme/bare', '--dry_run'])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert "code 0" in done.stdout and "max_steps: 6" in done.stdout and "recipes/whisper_lora/run.py" in done.stdout
    assert f"output_dir: {ROOT}/outputs/run_reproduced\n" in done.stdout and "audio_root" not in done.stdout
    assert done.returncode == 2 and "acme/bare on the Hub holds no run.json" in done.stderr


A_LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]) and 1)"
A_RUN = """
import pathlib, signal, sys, time
folder, heard = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: heard.append(int(number)))
(folder / "ready").touch()
until = time.time() + 20
while not heard and time.time() < until:
    time.sleep(0.02)
time.sleep(0.5)  # as long as it takes to save
(folder / "heard").write_text(str(heard))
sys.exit(75)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_once_and_its_end_is_waited_for(signum, tmp_path):
    def stop_when_it_runs():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    previous = signal.signal(signal.SIGTERM, _terminate)  # as every command has it
    stopper = threading.Thread(target=stop_when_it_runs, daemon=True)
    stopper.start()
    try:
        command = [sys.executable, "-c", A_LAUNCHER, A_RUN, str(tmp_path)]
        assert _launch(command, tmp_path, tmp_path / "run.json", DEMO) == EXIT_CODES[signum]
        assert signal.getsignal(signal.SIGTERM) == _terminate
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert (tmp_path / "heard").read_text() == f"[{int(signum)}]"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/demo.json")), ids=lambda path: path.parent.name)
def test_each_committed_demo_can_be_run_again(path, monkeypatch, tmp_path, capsys):
    """Its settings are those of the demo's arguments file, wherever one stands, and nothing is written by a dry run."""
    monkeypatch.chdir(tmp_path)
    assert reproduce(f"recipes/{path.parent.name}", dry_run=True) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed[printed.index("# What") : printed.index("\n\n", printed.index("# What"))])
    demo = yaml.safe_load(path.with_name("demo.yaml").read_text())
    for name in demo.keys() - {"output_dir"}:
        value = settings.get(name, json.loads(path.read_text())["arguments"][name])
        asked = [demo[name]] if isinstance(value, list) and not isinstance(demo[name], list) else demo[name]
        assert str(value) == str(asked) or float(value) == float(asked), name
    assert list(tmp_path.iterdir()) == []


# Settings of a record


def record_of(**changes):
    record = copy.deepcopy(DEMO)
    record["arguments"] |= changes
    return record


def test_revisions_are_pinned_to_the_commits_of_the_record():
    record = record_of(
        dataset_name=["me/a", "folder"], dataset_revision=["main"], retention_dataset_name="me/old",
        model_name_or_path="openai/whisper-small", model_revision="main",
    )  # fmt: skip
    record["model"]["commit"] = "1" * 40
    record["rows"]["account"]["datasets"] = [
        {"name": "me/a", "commit": "a" * 40}, {"name": "folder"}, {"name": "me/old", "commit": "b" * 40}
    ]  # fmt: skip
    settings = settings_of(record, LORA)
    assert settings["model_revision"] == "1" * 40
    assert settings["dataset_revision"] == ["a" * 40, "main"]
    assert settings["retention_dataset_revision"] == "b" * 40


def test_what_the_machine_chose_for_the_result_is_kept_and_the_rest_left_to_it():
    record = record_of(max_batch_seconds="auto", bf16=False, dataloader_num_workers=7, push_to_hub=True, use_cpu=True)
    record["chosen"] = {"bf16": True, "fp16": False, "max_batch_seconds": 812.5}
    settings = settings_of(record, LORA)
    assert settings["bf16"] is True and settings["fp16"] is False and settings["max_batch_seconds"] == 812.5
    assert not settings.keys() & {"dataloader_num_workers", "push_to_hub", "use_cpu", "accelerator_config"}


def test_a_run_without_a_gpu_is_repeated_without_one(monkeypatch):
    assert "use_cpu" not in settings_of(DEMO, LORA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings_of(DEMO, LORA)["use_cpu"] is True
    record = record_of(use_cpu=True)  # on a machine that has one
    record["environment"]["hardware"]["gpus"] = ["NVIDIA H100"]
    assert settings_of(record, LORA)["use_cpu"] is True


def test_a_stream_is_shared_out_to_as_many_workers():
    for workers in (7, default_num_workers()):  # what is the default here may be another one in the launched processes
        settings = settings_of(record_of(streaming=True, dataloader_num_workers=workers), LORA)
        assert settings["dataloader_num_workers"] == workers


def test_folders_of_a_manifest_are_kept_or_given_anew(tmp_path):
    record = record_of(audio_root=["clips"])
    assert settings_of(record, LORA)["audio_root"] == ["clips"]
    assert settings_of(record, LORA, {"audio_root": ["/there"]})["audio_root"] == ["/there"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="clips, which the record names, is not here: give --audio_root PATH"):
        reproduce(tmp_path / "record.json", dry_run=True)
    assert main(["reproduce", str(tmp_path / "record.json"), "--audio_root", str(tmp_path), "--dry_run"]) == 0


@pytest.mark.parametrize("sharding", [None, "fsdp2", "deepspeed_zero2"])
def test_a_run_is_sharded_as_it_was(sharding, monkeypatch):
    """By what accelerate itself makes of the command."""
    if sharding:
        monkeypatch.setenv(f"ACCELERATE_USE_{sharding.rstrip('2').partition('_')[0].upper()}", "true")
    record = record_of()
    record["environment"] = runs.environment() | {"processes": 4}
    assert record["environment"]["sharding"] == sharding
    _, _, _, *line = _command(LORA, "args.yaml", record)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert (args.num_processes, args.training_script, args.mixed_precision) == (4, str(LORA), "no")
    chosen = {None: args.multi_gpu, "fsdp2": args.use_fsdp, "deepspeed_zero2": args.use_deepspeed}
    assert [name for name, is_chosen in chosen.items() if is_chosen] == [sharding]
    assert args.fsdp_version == 2 or sharding != "fsdp2"
    record["environment"]["sharding"] = "../launch/fsdp2"
    with pytest.raises(UserError, match="sharded by ../launch/fsdp2, which this checkout lacks"):
        _command(LORA, "args.yaml", record)


def test_half_precision_needs_a_gpu(caplog):
    assert not settings_of(record_of(fp16=True), LORA).keys() & {"fp16", "bf16"}
    assert "fp16, which needs a GPU" in caplog.text


def test_the_folder_of_another_run_is_left_alone(finished):
    output_dir = finished.with_name("occupied")
    shutil.copytree(finished, output_dir)
    other = json.loads((output_dir / "run.json").read_text())
    other["arguments"]["learning_rate"] = 0.5
    (output_dir / "run.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=f"{output_dir} holds another run: choose another --output_dir"):
        reproduce(finished, output_dir)
    assert not (output_dir / "args.yaml").exists()


def test_what_is_no_longer_a_setting_is_named(caplog):
    settings_of(record_of(frobnication=0.5), LORA)  # of a record that does not say who set it
    assert "frobnication (0.5)" in caplog.text
    record = record_of(frobnication=0.5)
    record["sources"] = {"frobnication": "recipes/whisper_lora/demo.yaml"}
    with pytest.raises(UserError, match=rf"frobnication \(0.5\).*check out {COMMIT}"):
        settings_of(record, LORA)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"datasets": "gone/for/good"}, "gone/for/good.*--dataset_name PATH"),
        ({"model": "my_models/gone"}, "my_models/gone.*--model_name_or_path PATH"),
        (
            {"recipe": "recipes/of_old/run.py"},
            f"recipes/of_old/run.py, which this checkout lacks: check out {COMMIT}",
        ),
        ({"recipe": "recipes/../tests/conftest.py"}, "tests/conftest.py, which this checkout lacks"),
        ({"recipe": str(ROOT / "tests/conftest.py")}, "tests/conftest.py, which this checkout lacks"),
        ({"command": "python -c x"}, "does not say which recipe"),
    ],
)
def test_what_a_record_needs_and_is_not_here(change, message, tmp_path):
    record = record_of()
    if "datasets" in change:
        record["arguments"]["dataset_name"] = [change["datasets"]]
        record["rows"]["account"]["datasets"][0]["name"] = change["datasets"]
    if "model" in change:
        record["arguments"]["model_name_or_path"] = record["model"]["name_or_path"] = change["model"]
    record["recipe"] = change.get("recipe")
    record["environment"]["command"] = change.get("command", record["environment"]["command"])
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        reproduce(tmp_path / "record.json", dry_run=True)


def test_data_may_lie_elsewhere_by_now(tmp_path, few_digits, monkeypatch, capsys):
    record = record_of(dataset_name=["gone/for/good"])
    record["rows"]["account"]["datasets"][0]["name"] = "gone/for/good"
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.chdir(few_digits.parent)
    moved = {"dataset_name": [few_digits.name], "model_name_or_path": None}
    assert reproduce(tmp_path / "record.json", moved=moved, dry_run=True) == 0
    assert f"- {few_digits}\n" in capsys.readouterr().out


def test_a_run_is_not_written_over_itself(finished):
    with pytest.raises(UserError, match="is the run itself"):
        reproduce(finished, output_dir=finished)


def test_more_processes_than_gpus(monkeypatch, tmp_path):
    record = copy.deepcopy(DEMO)
    record["environment"]["processes"] = 8
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    assert reproduce(tmp_path / "record.json", dry_run=True) == 0  # they were on a CPU
    record["environment"]["hardware"]["gpus"] = ["NVIDIA H100"] * 8
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="8 processes.*2 GPUs"):
        reproduce(tmp_path / "record.json", dry_run=True)


def test_environments_differ_by_name():
    here = copy.deepcopy(DEMO["environment"])
    assert environment_text(DEMO["environment"], here) == "The environment is that of the record."
    here["commit"] += "+"  # as older records mark a checkout with changes
    here["versions"]["torch"] = "9.9"
    here["hardware"]["memory_bytes"] = 2**34  # nothing that older records knew
    lines = environment_text(DEMO["environment"], here).splitlines()
    assert [line.split()[0] for line in lines] == ["environment", "uncommitted", "torch"]


def test_the_commit_of_a_record():
    assert runs.commit_of({"commit": "abc+"}) == runs.commit_of({"commit": "abc", "dirty": True}) == ("abc", True)
    assert runs.commit_of({"commit": "abc", "dirty": False}) == ("abc", False)
    assert runs.commit_of({"commit": None, "dirty": None}) == ("", False)


def test_other_material_is_told():
    new = copy.deepcopy(DEMO)
    new["rows"]["account"]["splits"]["train"]["rows"] = 3
    new["model"]["fingerprint"], old = "sha256:b", copy.deepcopy(DEMO)
    old["model"]["fingerprint"] = "sha256:a"
    assert differences_of_material(DEMO, DEMO) == []
    told = differences_of_material(old, new)
    assert any("train rows" in sentence and "3 instead of 714" in sentence for sentence in told)
    assert any("The model has other weights" in sentence for sentence in told)
