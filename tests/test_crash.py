"""Nothing is lost: kill -9, torn checkpoints, full disks, signals, and a second launch in the same folder."""

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import soundfile
import torch
from conftest import ROOT, environment, recipe_command
from test_training import make_trainer
from transformers import TrainerCallback

from hfspeech.errors import EXIT_CODES, Interrupted, UserError, explain_errors
from hfspeech.publish import publish
from hfspeech.runs import clear_half_written, is_whole_checkpoint, last_checkpoint, read_json, write_json
from hfspeech.runs.files import lock_folder
from hfspeech.training import trainer as trainer_module
from hfspeech.training.stopping import StopRequest

KILLS = os.environ.get("HFSPEECH_KILLS", "25")


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def assert_same_weights(one, other):
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters()):
        assert torch.equal(a, b), name


# Kills


def test_a_run_killed_often_ends_like_one_left_in_peace(tmp_path):
    """25 times kill -9 in one run and 5 times SIGTERM in another, at any moment: the same weights, bit by bit, the same
    losses at the same steps, the same seconds of audio, the same results and predictions. See torture.py."""
    command = [sys.executable, str(ROOT / "tests/torture.py"), "--kills", KILLS, "--terms", "5", "--folder", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["differences"] == []
    killed, stopped = outcome["killed"], outcome["stopped"]
    assert killed.pop("half-written") >= 2 and {"write", "operation", "after"} <= killed.keys()
    assert sum(killed.values()) == int(KILLS)
    assert stopped.pop("half-written") == 0 and sum(stopped.values()) == 5


# Checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(few_digits, tmp_path_factory):
    """The output folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    make_trainer(few_digits, folder, eval_strategy="no", load_best_model_at_end=False).train_or_resume()
    return folder


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def fill_with_zeros(path):
    """What a file is after a loss of power that its size has survived, but not the last of its content."""
    size, kept = path.stat().st_size, path.stat().st_size * 3 // 4
    os.truncate(path, kept)
    os.truncate(path, size)


@pytest.mark.parametrize("damage", [cut, fill_with_zeros, os.remove], ids=lambda damage: damage.__name__)
def test_a_torn_checkpoint_is_seen_and_the_one_before_is_used(two_checkpoints, tmp_path, damage):
    names = sorted(path.name for path in (two_checkpoints / "checkpoint-4").iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "progress.json", "whole.json"} <= set(names)  # fmt: skip
    for name in names:
        run = shutil.copytree(two_checkpoints, tmp_path / name)
        assert last_checkpoint(run) == str(run / "checkpoint-4")
        damage(run / "checkpoint-4" / name)
        assert not is_whole_checkpoint(run / "checkpoint-4")
        assert last_checkpoint(run) == str(run / "checkpoint-2"), name
        clear_half_written(run, last_checkpoint(run))
        assert not (run / "checkpoint-4").exists() and (run / "checkpoint-2").exists()


def test_what_a_killed_launch_left_behind_is_cleared_away(two_checkpoints, few_digits, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (run / "checkpoint.part").mkdir()
    (run / "checkpoint-4").rename(run / "checkpoint.part/checkpoint-4")  # all but its name
    for name in ("run.json.part", "predictions.jsonl.part"):
        (run / name).write_text('{"half')
    (run / "files.part").mkdir()
    (run / "files.part/model.safetensors").write_bytes(b"half")
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    (run / "run.json").unlink()
    again = make_trainer(few_digits, run, eval_strategy="no", load_best_model_at_end=False)
    again.train_or_resume()
    again.measure("after", again.speech)
    publish(again, again.speech)
    assert read_json(run / "run.json")["state"] == "finished"
    assert is_whole_checkpoint(run / "checkpoint-4")
    assert not list(run.glob("*.part"))


def test_the_new_checkpoint_is_kept_whatever_the_clock_says(few_digits, tmp_path):
    """The clock is set back by an hour after the first checkpoint; which one is the newest must not depend on it."""
    trainer = make_trainer(
        few_digits, tmp_path, save_total_limit=1, eval_strategy="no", load_best_model_at_end=False, max_steps=6
    )
    later = time.time() + 3600
    trainer.add_callback(At(3, lambda: os.utime(tmp_path / "checkpoint-2", (later, later))))
    trainer.train_or_resume()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-6"]


def test_the_best_and_the_newest_are_kept_where_one_is_allowed(few_digits, tmp_path):
    """The last good checkpoint is there until the new one is whole."""
    trainer = make_trainer(few_digits, tmp_path, save_total_limit=1, max_steps=6, learning_rate=3.0)
    seen = []
    original = trainer_module.finish_checkpoint

    def finish(part, folder):
        seen.append(last_checkpoint(tmp_path))
        original(part, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "finish_checkpoint", finish)
        trainer.train_or_resume()
    assert seen == [None, str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")]
    assert last_checkpoint(tmp_path, trainer.state.best_global_step)
    state = json.loads((tmp_path / f"checkpoint-{trainer.state.best_global_step}/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")


# Full disks


class Disk:
    """A disk of 3 MB, mounted at `folder`."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self):
        with self.ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self):
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_full_at_a_checkpoint(disk, few_digits, tmp_path):
    """No torn folder, the checkpoint before stays, one sentence; with some room the same command ends as if nothing
    had been."""
    settings = {"max_steps": 6, "save_total_limit": 1, "report_to": ["tensorboard"]}
    trainer = make_trainer(few_digits, disk.folder / "run", **settings)
    trainer.add_callback(At(3, disk.fill))
    with pytest.raises(UserError, match="No space left on device.*same command again|could not be written to its end"):
        trainer.train_or_resume()
    assert trainer.state.global_step == 4
    assert [path.name for path in (disk.folder / "run").glob("checkpoint*")] == ["checkpoint-2"]
    assert is_whole_checkpoint(disk.folder / "run/checkpoint-2")
    disk.free()
    again = make_trainer(few_digits, disk.folder / "run", **settings)
    again.train_or_resume()
    whole = make_trainer(few_digits, tmp_path / "whole", **settings)
    whole.train_or_resume()
    assert again.results["train"]["steps"] == 6
    assert_same_weights(whole, again)


def test_a_disk_that_is_full_when_results_are_written(disk, few_digits):
    """What was written before stays whole: the record, the predictions, and an earlier model."""
    run = disk.folder / "run"
    trainer = make_trainer(few_digits, run, max_steps=2)
    trainer.train_or_resume()
    trainer.measure("after", trainer.speech)
    publish(trainer, trainer.speech)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    disk.fill()
    for write in (
        lambda: trainer.measure("after", trainer.speech),
        lambda: publish(trainer, trainer.speech),
        lambda: trainer.write_record(trainer.speech),
        lambda: write_json(run / "new.json", {"text": "x" * 10000}),
    ):
        with pytest.raises(UserError, match=f"Writing to {run} failed .No space left on device.: free some space"):
            write()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    disk.free()
    publish(trainer, trainer.speech)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_disk_that_is_full_of_curves_does_not_stop_the_run(disk, few_digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(disk.folder / "runs"))
    caplog.set_level(logging.WARNING, "hfspeech")
    trainer = make_trainer(few_digits, tmp_path / "run", max_steps=6, report_to=["tensorboard"])
    trainer.add_callback(At(2, disk.fill))
    trainer.train_or_resume()
    assert trainer.results["train"]["steps"] == 6
    assert list((disk.folder / "runs").glob("events*"))
    assert sum("No more curves for TensorBoard" in record.message for record in caplog.records) == 1


# Signals


def test_a_run_stopped_at_every_step_ends_like_one_left_in_peace(few_digits, tmp_path):
    """An evaluation for which there was no time is made by the next launch, the last one too; a loss is logged over the
    same steps, a broken recording counted once, and the same random numbers are drawn."""
    data = shutil.copytree(few_digits, tmp_path / "data")
    ogg = sorted((data / "train").glob("*.ogg"))[3]
    waveform, rate = soundfile.read(ogg)
    soundfile.write(ogg.with_suffix(".flac"), waveform, rate)
    cut(ogg.with_suffix(".flac"))
    metadata = data / "train/metadata.csv"
    metadata.write_text(metadata.read_text().replace(ogg.name, ogg.with_suffix(".flac").name))
    settings = {
        "max_steps": 8,
        "logging_steps": 3,
        "on_bad_audio": "skip",
        "speeds": [0.9, 1.1],
        "save_total_limit": None,
    }
    settings["model_changes"] = {"apply_spec_augment": True, "mask_feature_length": 8, "mask_time_length": 5}

    def launch(name, stop_at=None):
        trainer = make_trainer(data, tmp_path / name, **settings)
        if stop_at:
            trainer.callback_handler.callbacks.insert(
                0, At(stop_at, lambda: trainer.stop_request(signal.SIGTERM, None))
            )
        trainer.measure("before", trainer.speech)
        trainer.train_or_resume()
        trainer.measure("after", trainer.speech)
        return trainer

    whole = launch("whole")
    for step in range(1, 9):
        with pytest.raises(Interrupted, match=f"Stopped at step {step} of 8") as stop:
            launch("run", stop_at=step)
        assert stop.value.exit_code == 75
        assert last_checkpoint(tmp_path / "run", step)
    last = launch("run")
    assert_same_weights(whole, last)

    def comparable(trainer):
        results = read_json(trainer.record_file)
        log = [{key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
               for entry in results["train"]["log"]]  # fmt: skip
        names = ("steps", "best_step", "audio_seconds")
        return results["before"], results["after"], results["rows"], log, [results["train"][name] for name in names]

    assert comparable(last) == comparable(whole)
    assert comparable(last)[2]["bad_audio"]["train"]["count"] == 1


def test_a_worker_is_born_deaf_to_what_reaches_every_process():
    """A signal that comes while a pass begins must not kill a worker that has only just been forked."""
    previous = signal.signal(signal.SIGTERM, StopRequest())
    try:
        if (child := os.fork()) == 0:
            os._exit(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        _, status = os.waitpid(child, 0)
        blocked_here = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert os.waitstatus_to_exitcode(status) == 1 and not blocked_here


def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_echo_of_the_first(monkeypatch):
    request, now = StopRequest(), time.monotonic()
    request(signal.SIGTERM, None)
    request(signal.SIGTERM, None)  # from the cluster, and from the launcher which the cluster has signalled too
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    for number in EXIT_CODES:
        with pytest.raises(SystemExit) as end:
            request(number, None)
        assert end.value.code == EXIT_CODES[number]


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_outside_of_training_ends_in_order(number, capsys):
    before = signal.getsignal(signal.SIGTERM)

    @explain_errors
    def main():
        with contextlib.suppress(Exception):  # as a library does that tries again whatever happens
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_CODES[number]
    assert capsys.readouterr().err.startswith("Stopped.")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preempted_job_under_accelerate(processes, few_digits, tmp_path):
    """A cluster signals every process of a job step: launcher, training and dataloader workers, all at once."""
    flags = ["--max_steps", 500, "--eval_steps", 2, "--save_steps", 2, "--per_device_train_batch_size", 4]
    flags += ["--max_test_samples", 2, "--report_to", "none", "--dataloader_num_workers", 1]
    run = tmp_path / "run"
    command = recipe_command("whisper_full", *flags, data=few_digits, output_dir=run, processes=processes)
    if processes == 1:  # a launcher of one process would be gone before it, and the job step with it
        command = ["bash", "-c", "trap '' TERM; exec \"$@\"", "-", *command]
    log = (tmp_path / "log").open("w+")
    launcher = psutil.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    deadline = time.time() + 180
    while last_checkpoint(run) is None and launcher.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    family = [*launcher.children(recursive=True), launcher]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 1
    # Nothing of the job has outlived its launcher, which may be all that a cluster waits for.
    assert read_json(run / "run.json")["state"] == "interrupted"
    said = log.seek(0) or log.read()
    assert "the same command" in said.lower() and "DataLoader worker" not in said
    assert not (run / "checkpoint.part").exists()
    psutil.wait_procs(family, timeout=20)


# Two launches


def hold(folder, connection):
    """Locks a folder, forks a worker as a dataloader does, and waits to be killed."""
    lock_folder(folder)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    connection.send(worker.pid)
    time.sleep(60)


def test_a_second_launch_is_refused_until_the_first_has_ended(tmp_path):
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    holder.start()
    worker = here.recv()
    try:
        with pytest.raises(UserError, match=f"{tmp_path} is in use .process {holder.pid} on .*--output_dir"):
            lock_folder(tmp_path)
        holder.kill()
        holder.join()
        assert psutil.pid_exists(worker)  # which holds nothing
        lock_folder(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
