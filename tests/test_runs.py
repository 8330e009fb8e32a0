"""Run records: one folder one run, what a record holds, and files that are written whole or not at all."""

import errno
import json
import os
import re
import resource
import shutil
import sys

import pytest
import safetensors.torch
import torch
from conftest import NANO

from hfspeech import runs
from hfspeech.arguments import (
    LoraArguments,
    WhisperArguments,
    WhisperTrainingArguments,
    parse_arguments,
)
from hfspeech.errors import UserError
from hfspeech.runs import (
    RUN_FILE,
    environment,
    find_record,
    open_run,
    read_json,
    require_space,
    what_is_run,
    write_json,
    write_jsonl,
    writing,
)


def arguments(output_dir, **settings):
    settings = {"output_dir": str(output_dir), "use_cpu": True, **settings}
    return parse_arguments(settings, [], (WhisperTrainingArguments,))[0]


# One folder, one run


def test_a_new_folder_gets_a_record(tmp_path):
    open_run(arguments(tmp_path / "a/b", learning_rate=1e-3))
    record = read_json(tmp_path / "a/b" / RUN_FILE)
    assert record["arguments"]["learning_rate"] == 1e-3
    assert record["environment"]["versions"]["torch"]
    assert record["state"] == "running"
    assert sorted(os.listdir(tmp_path / "a/b")) == [".lock", RUN_FILE]


def test_the_same_run_may_come_back(tmp_path):
    open_run(arguments(tmp_path, max_steps=5, lr_scheduler_kwargs={"num_cycles": 2}, lr_scheduler_type="cosine"))
    before = (tmp_path / RUN_FILE).read_text()
    open_run(arguments(tmp_path, max_steps=5, lr_scheduler_kwargs={"num_cycles": 2}, lr_scheduler_type="cosine",
                       logging_steps=1, dataloader_num_workers=0, report_to=["none"]))  # fmt: skip
    assert (tmp_path / RUN_FILE).read_text() == before


def test_another_run_is_refused_and_the_differences_named(tmp_path):
    open_run(arguments(tmp_path, learning_rate=1e-3))
    with pytest.raises(UserError) as error:
        open_run(arguments(tmp_path, learning_rate=2e-3, seed=7))
    message = str(error.value)
    assert str(tmp_path) in message and "--output_dir" in message and "\n" not in message
    assert "learning_rate 0.001 there, 0.002 here" in message and "seed 42 there, 7 here" in message


def test_a_mistake_does_not_hold_its_folder(tmp_path):
    """A launch that failed before it measured or trained anything was the wrong command, and the right one may follow."""
    open_run(arguments(tmp_path, seed=1))
    record = read_json(tmp_path / RUN_FILE)
    write_json(tmp_path / RUN_FILE, record | {"state": "failed"})
    open_run(arguments(tmp_path, seed=2))
    found = read_json(tmp_path / RUN_FILE)
    assert found["arguments"]["seed"] == 2 and found["state"] == "running"
    for begun in ({"state": "failed", "before": {}}, {"state": "interrupted"}):
        write_json(tmp_path / RUN_FILE, record | begun)
        with pytest.raises(UserError, match="seed 1 there, 2 here"):
            open_run(arguments(tmp_path, seed=2))


def test_many_differences_are_counted(tmp_path):
    open_run(arguments(tmp_path))
    with pytest.raises(UserError, match="and 2 more"):
        open_run(arguments(tmp_path, learning_rate=1, seed=7, max_steps=3, weight_decay=0.1, warmup_steps=9))


def split(rows, accumulation, **settings):
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, **settings}


@pytest.mark.parametrize("processes, rows, accumulation", [(1, 16, 1), (2, 8, 1), (2, 4, 2), (4, 1, 4)])
def test_another_number_of_processes_is_the_same_run_if_a_step_takes_in_as_many_rows(
    processes, rows, accumulation, tmp_path, monkeypatch
):
    open_run(arguments(tmp_path, **split(4, 4)))
    here = arguments(tmp_path, **split(rows, accumulation))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    open_run(here)


@pytest.mark.parametrize(
    "began, here, processes, advice",
    [
        (split(4, 4), split(4, 4), 2, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        (split(4, 4), split(3, 1), 2, "--per_device_train_batch_size 8 --gradient_accumulation_steps 1"),
        (split(4, 4), split(4, 1), 3, "3 processes cannot share its steps evenly"),
        (split(4, 4, max_batch_seconds=60), split(4, 4, max_batch_seconds=60), 2, "--gradient_accumulation_steps 2"),
    ],
)
def test_another_number_of_processes_is_told_how_to_share_the_steps(
    began, here, processes, advice, tmp_path, monkeypatch
):
    open_run(arguments(tmp_path, **began))
    args = arguments(tmp_path, **here)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=advice) as error:
        open_run(args)
    assert "in a step" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_moved_is_the_same_run(tmp_path):
    open_run(arguments(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    open_run(arguments(tmp_path / "there"))


@pytest.mark.parametrize("name", ["checkpoint-10"])
def test_the_remains_of_a_foreign_run_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}.*--output_dir"):
        open_run(arguments(tmp_path))
    assert not (tmp_path / RUN_FILE).exists()


def test_a_push_that_cannot_be_is_refused_before_the_run(tmp_path):
    with pytest.raises(UserError, match="offline mode is on.*unset HF_HUB_OFFLINE"):
        open_run(arguments(tmp_path / "run", push_to_hub=True))
    settings = {"output_dir": str(tmp_path / "run"), "model_name_or_path": str(NANO), "push_to_hub": True}
    train_args = parse_arguments(settings, [], (WhisperTrainingArguments, WhisperArguments, LoraArguments))[0]
    with pytest.raises(UserError, match="Nobody else could load an adapter on .*--hub_merge true"):
        open_run(train_args)
    assert not (tmp_path / "run" / RUN_FILE).exists()


def test_other_files_are_no_obstacle(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    open_run(arguments(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["", '{"arguments": {"lear', '{"other": 1}', "[]"])
def test_a_damaged_record_is_named(tmp_path, damage):
    (tmp_path / RUN_FILE).write_text(damage)
    with pytest.raises(UserError, match="run.json"):
        open_run(arguments(tmp_path))


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"{place}.*--output_dir"):
            open_run(arguments(place))


def test_a_full_disk_is_seen_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=3 * 2**20))
    with pytest.raises(UserError, match="3 MB free.*--output_dir"):
        open_run(arguments(tmp_path))
    require_space(tmp_path, 2 * 2**20)


def test_a_record_is_found_in_a_run_a_recipe_or_as_a_file(tmp_path, monkeypatch):
    open_run(arguments(tmp_path / "run"))
    assert find_record(tmp_path / "run") == find_record(tmp_path / "run" / RUN_FILE) == tmp_path / "run" / RUN_FILE
    monkeypatch.chdir(tmp_path)
    assert find_record("recipes/whisper_lora") == runs.CHECKOUT / "recipes/whisper_lora/demo.json"
    with pytest.raises(UserError, match="no record of a run in elsewhere"):
        find_record("elsewhere")


def test_the_recipe_is_named_as_it_lies_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(runs.CHECKOUT / "recipes/speecht5_full/run.py"), "--seed", "1"])
    open_run(arguments(tmp_path))
    assert read_json(tmp_path / RUN_FILE)["recipe"] == "recipes/speecht5_full/run.py"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py")])
    assert what_is_run(arguments(tmp_path))["recipe"] is None


# Environment


def test_an_environment_says_what_a_result_depends_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__, "--seed", "1", "--run_name", "two words"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    found = environment()
    assert found == json.loads(json.dumps(found))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["date"])
    assert (found["commit"], found["dirty"]) == (None, None) or (
        re.fullmatch(r"[0-9a-f]{40}", found["commit"]) and isinstance(found["dirty"], bool)
    )
    assert found["command"] == f"python {os.path.relpath(__file__)} --seed 1 --run_name 'two words'"
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1 and isinstance(found["hardware"]["gpus"], list)
    assert 2**28 < found["hardware"]["memory_bytes"] < 2**50
    assert found["processes"] == 1
    import transformers

    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(found["versions"][name] for name in ("hfspeech", "torch", "datasets", "peft", "jiwer"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert environment()["command"].startswith("accelerate launch ")


def test_peak_memory_is_in_bytes():
    assert 50e6 < runs.peak_rss_bytes() < 1e12  # torch alone takes that much


# Files


def test_files_come_back_as_they_were_written(tmp_path):
    write_json(tmp_path / "a.json", {"text": "Grüße", "rate": 0.125, "none": None})
    assert read_json(tmp_path / "a.json") == {"text": "Grüße", "rate": 0.125, "none": None}
    write_jsonl(tmp_path / "a.jsonl", ({"n": n} for n in range(3)))
    assert (tmp_path / "a.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    write_json(tmp_path / "a.json", {"n": 1})
    write_jsonl(tmp_path / "b.jsonl", [{"n": 1}])

    def rows():
        yield {"n": 2}
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=f"{tmp_path}.*No space left on device"):
        write_jsonl(tmp_path / "b.jsonl", rows())
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"n": object()})
    assert read_json(tmp_path / "a.json") == {"n": 1}
    assert (tmp_path / "b.jsonl").read_text() == '{"n": 1}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_is_full_is_one_sentence():
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(UserError, match="No space left on device"), writing("/dev"):
        os.write(full, b"x")
    os.close(full)


def test_what_is_no_fault_of_the_disk_keeps_its_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        open(tmp_path / "missing/file")
    with pytest.raises(ConnectionResetError), writing(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(RuntimeError), writing(tmp_path):
        raise RuntimeError("PytorchStreamReader failed reading zip archive")


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, save):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # a real refusal by the kernel, as a full disk is
    try:
        with pytest.raises(UserError, match=f"Writing to {tmp_path} failed"), writing(tmp_path):
            save({"weight": torch.zeros(2**16)}, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
