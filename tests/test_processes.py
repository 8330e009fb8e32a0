"""Several processes, on a CPU joined by gloo: the same steps as one, resumed by another number, ended together."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, copy_rows, environment
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from hfspeech.errors import UserError, explain_errors
from hfspeech.runs import last_checkpoint
from hfspeech.training.sharding import require_same_layout

LAUNCH = ROOT / "recipes/launch"
# Steps of eight rows, of which 23 are good. Nothing is random but the order.
STEPS = ["--max_steps", 9, "--eval_steps", 3, "--save_steps", 3, "--save_total_limit", 4, "--logging_steps", 1]
STEPS += ["--warmup_steps", 0, "--learning_rate", 3e-4, "--lr_scheduler_type", "constant", "--apply_spec_augment", "false"]
STEPS += ["--encoder_window", "auto", "--full_window_share", 0.4, "--group_columns", "split", "--report_to", "none"]
STEPS += ["--max_test_samples", 20, "--retention_share", 0, "--dropout", 0, "--on_bad_audio", "skip"]


FSDP = ("fsdp2.yaml", ROOT / "tests/fsdp_on_cpu.py")
ZERO3 = ("deepspeed_zero3.yaml", ROOT / "tests/deepspeed_on_cpu.py")
with_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")


def arguments(output_dir, data, *flags, recipe="whisper_full"):
    recipe = ROOT / "recipes" / recipe
    line = [recipe / "run.py", recipe / "demo.yaml", "--dataset_name", data, "--output_dir", output_dir, *STEPS, *flags]
    return [str(part) for part in line]


def begin(config, processes, *args, **options):
    """Starts a recipe under a shipped launch configuration."""
    config, *before = config if isinstance(config, tuple) else [config]
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / config]
    line += ["--num_processes", processes, "--main_process_port", 0, *before]
    line = [*map(str, line), *arguments(*args, **options)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(config, processes, output_dir, *args, **options):
    """Runs a launch to its end and returns its record and what it said."""
    process = begin(config, processes, output_dir, *args, **options)
    printed, said = process.communicate(timeout=300)
    if process.returncode:
        pytest.fail(f"{' '.join(process.args)}\n{printed[-3000:]}\n{said[-6000:]}")
    return read(output_dir), said


def run_here(monkeypatch, output_dir, *args, **options):
    """Runs a recipe in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", arguments(output_dir, *args, **options))
    runpy.run_path(sys.argv[0], run_name="__main__")
    return read(output_dir)


def read(output_dir):
    return json.loads((output_dir / "run.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 train, 6 validation and 8 test rows; the last one of train and of test are not audio."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    for split, count in (("train", 24), ("validation", 6), ("test", 8)):
        copy_rows(folder, split, count)
        if split != "validation":
            last = (folder / split / "metadata.csv").read_text().splitlines()[-1].split(",")[0]
            (folder / split / last).write_bytes(f"no audio, in {split}".encode())
    return folder


def split(rows, accumulation=1):
    return ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulation]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """(output folder, record) of a run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, run("cpu.yaml", 1, folder, data, *split(4, 2))[0]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """(output folder, record) of the same run in two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, run("cpu_processes.yaml", 2, folder, data, *split(4))[0]


def at_its_first_checkpoint(folder, target):
    """Copies a run as it would have been left, had it been killed behind its first checkpoint."""
    shutil.copytree(folder, target)
    for later in ("checkpoint-6", "checkpoint-9"):
        shutil.rmtree(target / later)
    record = json.loads((target / "run.json").read_text())
    del record["train"], record["after"]
    (target / "run.json").write_text(json.dumps(record))
    return target


def curve(record):
    return np.array([(step["loss"], step["grad_norm"]) for step in record["train"]["log"] if "grad_norm" in step])


def assert_same_run(found, expected):
    """Each a pair of output folder and record: the same steps, the same counts, the same weights."""
    (folder, record), (expected_folder, expected_record) = found, expected
    assert len(curve(record)) == 9
    np.testing.assert_allclose(curve(record), curve(expected_record), rtol=2e-3)
    assert record["train"]["audio_seconds"] == pytest.approx(expected_record["train"]["audio_seconds"])
    for when in ("before", "after"):
        assert record[when]["rows"] == 7  # each of the good rows once
        for name in ("wer", "words"):
            assert record[when][name] == expected_record[when][name], (when, name)
        assert record[when]["loss"] == pytest.approx(expected_record[when]["loss"], rel=1e-3)
    assert {stage: told["count"] for stage, told in record["rows"]["bad_audio"].items()} == {
        stage: told["count"] for stage, told in expected_record["rows"]["bad_audio"].items()
    }
    theirs = load_file(expected_folder / "model.safetensors")
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4)


def test_two_processes_are_one(one, two):
    assert_same_run(two, one)
    assert two[1]["environment"]["processes"] == 2
    assert one[1]["rows"]["bad_audio"]["train"]["count"] == 1  # both rows that are no audio are counted once ...
    assert two[1]["rows"]["bad_audio"]["after_test"]["count"] == 1  # ... by whichever process had them


def test_four_processes_go_on_with_a_run_of_two(one, two, data, tmp_path):
    folder = at_its_first_checkpoint(two[0], tmp_path / "run")
    record, said = run("cpu_processes.yaml", 4, folder, data, *split(2))
    assert "Going on from" in said and record["environment"]["processes"] == 4
    assert_same_run((folder, record), one)


def test_one_process_goes_on_with_a_run_of_two(one, two, data, tmp_path, monkeypatch):
    folder = at_its_first_checkpoint(two[0], tmp_path / "run")
    record = run_here(monkeypatch, folder, data, *split(8))
    assert record["environment"]["processes"] == 1
    assert_same_run((folder, record), one)


def wait_for(path, process, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        if process.poll() is not None or time.time() > deadline:
            pytest.fail(f"{path} did not come: {process.communicate()[1][-6000:]}")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "config, steps, more, steps_of_more",
    [
        pytest.param(FSDP, split(4), 4, split(2), id="fsdp2"),
        # Of the small batches, some fill the window in one process and not in the other: both run the same layers.
        pytest.param(ZERO3, split(2, 2), 2, split(4), id="zero3", marks=with_deepspeed),
    ],
)
def test_a_sharded_model_is_the_same_model(config, steps, more, steps_of_more, one, data, tmp_path):
    """Sharded over two processes, stopped by a signal, gone on with by as many or more, and loaded by stock tools."""
    folder = tmp_path / "run"
    process = begin(config, 2, folder, data, *steps)
    wait_for(folder / "checkpoint-3/trainer_state.json", process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    stopped = re.findall(r"Stopped at step (\d+) of 9", said)
    assert len(stopped) == 1 and int(stopped[0]) < 9 and process.returncode, said
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{stopped[0]}")

    record, said = run(config, more, folder, data, *steps_of_more)
    assert f"Going on from {folder}/checkpoint-{stopped[0]}" in said
    assert_same_run((folder, record), one)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    assert model.config.architectures == ["WhisperForConditionalGeneration"]


@pytest.mark.parametrize("config", [FSDP, pytest.param(ZERO3, marks=with_deepspeed)], ids=["fsdp2", "zero3"])
def test_a_sharded_adapter_is_the_same_adapter(config, data, tmp_path, monkeypatch):
    """With batches of as many rows as fit into so many seconds, which the steps of both are made of."""
    flags = ["--max_batch_seconds", 12, "--max_steps", 3, "--lora_dropout", 0, "--eval_on_start", "false"]
    options = {"recipe": "whisper_lora"}
    expected = run_here(monkeypatch, tmp_path / "one", data, *flags, "--gradient_accumulation_steps", 2, **options)
    record, _ = run(config, 2, tmp_path / "run", data, *flags, **options)
    np.testing.assert_allclose(curve(record), curve(expected), rtol=2e-3)
    assert record["after"]["loss"] == pytest.approx(expected["after"]["loss"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_takes_every_launch_configuration(path):
    """The command at its top passes accelerate's own loader, parser and checks, and names a recipe that exists."""
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    line = re.search(r"(?:OMP_NUM_THREADS=1 )?accelerate launch (.*)", " ".join(comment).replace("\\ ", ""))[1].split()
    assert line[:2] == ["--config_file", f"recipes/launch/{path.name}"]
    args = launch_command_parser().parse_args([part.replace("recipes/", f"{ROOT}/recipes/") for part in line])
    args, config, _ = _validate_launch_command(args)
    assert Path(args.training_script).exists()
    if args.num_processes > 1:
        args.main_process_port = 0
        told = prepare_multi_gpu_env(args)
        assert (told.get("ACCELERATE_USE_FSDP") == "true") == (path.name == "fsdp2.yaml")
        assert args.nnodes == "2" if path.name == "several_machines.yaml" else args.nproc_per_node == str(args.num_processes)
    if args.use_deepspeed:
        assert path.stem == f"deepspeed_zero{args.zero_stage}"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.safetensors", "several_gpus"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "fsdp2"),
        ("global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "deepspeed_zero2"),
        ("global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt", "deepspeed_zero3"),
    ],
)
def test_a_run_stays_with_its_kind_of_launch_configuration(name, expected, tmp_path):
    """What was sharded one way is not gone on with in another, nor by another number of DeepSpeed's processes."""
    for part in {name, name.replace("model_states", "optim_states")}:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).touch()
    args = SimpleNamespace(world_size=2, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    refused = "--num_processes 1" if expected == "deepspeed_zero3" else f"recipes/launch/{expected}.yaml"
    with pytest.raises(UserError, match=refused):
        require_same_layout(tmp_path, args)


def slurm(folder, standin, data):
    """Starts the SLURM job on two nodes of one process, with stand-ins for SLURM's programs, as SLURM would."""
    programs = f"{standin}:{ROOT}/tests/slurm:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1"}
    env = environment(PATH=programs, SLURM_STANDIN=str(standin), OUTPUT_DIR=str(folder), **job)
    recipe, *flags = arguments(folder, data, *split(4))
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", recipe, *flags], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_slurm_job_is_queued_again_and_goes_on(one, data, tmp_path):
    """What SLURM sends before a job's time is up ends in one checkpoint, from which the requeued job goes on."""
    folder = tmp_path / "run"
    job = slurm(folder, tmp_path, data)
    wait_for(folder / "checkpoint-3/trainer_state.json", job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=90)
    assert (tmp_path / "requeued").exists(), said
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert job.returncode and read(folder)["state"] == "interrupted"

    job = slurm(folder, tmp_path, data)
    said, _ = job.communicate(timeout=180)
    assert job.returncode == 0, said
    assert "Going on from" in said and (tmp_path / "requeued").read_text() == "4711\n"
    assert read(folder)["state"] == "finished"
    assert_same_run((folder, read(folder)), one)


def test_a_slurm_job_that_fails_is_not_queued_again(data, tmp_path):
    """Not even if the launch before it was interrupted."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{\n  "state": "interrupted"\n}\n')
    (tmp_path / "accelerate").symlink_to(shutil.which("false"))
    job = slurm(folder, tmp_path, data)
    said, _ = job.communicate(timeout=60)
    assert job.returncode and not (tmp_path / "requeued").exists(), said


def test_a_fault_that_one_process_finds_ends_all(data, tmp_path):
    """A row that is no audio stops the run: said once, no process waits for another, and what is trained is kept."""
    flags = [*split(2), "--on_bad_audio", "error", "--eval_on_start", "false", "--eval_strategy", "no"]
    process = begin("cpu_processes.yaml", 2, tmp_path / "run", data, *flags)
    _, said = process.communicate(timeout=120)
    assert process.returncode
    (told,) = [line for line in said.splitlines() if "--on_bad_audio skip" in line]
    step = re.search(r"The (\d+) steps trained so far are saved", told)[1]
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / f"run/checkpoint-{step}")


@pytest.mark.parametrize("rank, code, told", [("0", 2, "Nothing works.\n"), ("1", 0, "")])
def test_what_all_have_agreed_on_is_said_by_the_first(rank, code, told, monkeypatch, capsys):
    @explain_errors
    def main():
        raise UserError("Nothing works.", of_all=True)

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (code, told)


@pytest.mark.parametrize("error, raised", [("Connection closed by peer [::1]:7", SystemExit), ("size", RuntimeError)])
def test_a_lost_connection_is_told_from_other_errors(error, raised, capsys):
    @explain_errors
    def main():
        raise RuntimeError(error)

    with pytest.raises(raised):
        main()
    assert ("Another process of this run has ended" in capsys.readouterr().err) == (raised is SystemExit)


def test_the_death_of_one_process_ends_all(data, tmp_path):
    process = begin("cpu_processes.yaml", 2, tmp_path / "run", data, *split(4), "--max_steps", 500)
    wait_for(tmp_path / "run/checkpoint-3/trainer_state.json", process)
    ranks = [p for p in psutil.Process(process.pid).children() if "run.py" in " ".join(p.cmdline())]
    victim = next(p for p in ranks if p.environ().get("RANK") == "1")
    victim.kill()
    killed = time.time()
    _, said = process.communicate(timeout=60)
    assert time.time() - killed < 45 and process.returncode
    assert f"Signal 9 (SIGKILL) received by PID {victim.pid}" in said
    assert "Another process of this run has ended" in said and "Connection closed" not in said
    assert last_checkpoint(tmp_path / "run")
