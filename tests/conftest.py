"""What the tests share: the shipped nano Whisper, a few shipped rows, and a way to launch a recipe as a user does."""

import csv
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything asks the Hub; tests of the Hub bring their own
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to it

ROOT = Path(__file__).parent.parent
NANO = ROOT / "assets/nano_whisper"
NANO_SPEECHT5 = ROOT / "assets/nano_speecht5"
DIGITS = ROOT / "assets/espeak_digits"
VOICE = ROOT / "assets/flite_voice"
NEW_DIGITS = ROOT / "assets/flite_digits"


@pytest.fixture(autouse=True)
def notes_go_to_pytest():
    """A program's main function, run in this process, sends the package's notes elsewhere."""
    notes = logging.getLogger("hfspeech")
    notes.handlers, notes.propagate = [], True
    notes.setLevel(logging.NOTSET)


def copy_rows(target, split, count, source=NEW_DIGITS):
    """Copies the first rows of a shipped split into an audiofolder of its own."""
    folder = Path(target) / split
    folder.mkdir(parents=True)
    with (source / split / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    for row in rows:
        shutil.copy(source / split / row["file_name"], folder / row["file_name"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return Path(target)


def one_pass(stream):
    """Returns the rows of a `SpeechStream` until a source begins anew."""
    return list(itertools.takewhile(lambda row: not row.get("epoch"), stream))


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """An audiofolder with 24 train, 6 validation and 8 test rows."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    for split, count in (("train", 24), ("validation", 6), ("test", 8)):
        copy_rows(folder, split, count)
    return folder


@pytest.fixture(scope="session")
def nano_speecht5_processor():
    from transformers import SpeechT5Processor

    return SpeechT5Processor.from_pretrained(NANO_SPEECHT5)


@pytest.fixture(scope="session")
def short_voice(tmp_path_factory):
    """An audiofolder of one voice with 16 train, 4 validation and 4 test rows."""
    folder = tmp_path_factory.mktemp("voice") / "voice"
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        copy_rows(folder, split, count, VOICE)
    return folder


def environment(**changes):
    """The environment of a launched program: one thread, no network, and whatever the test adds."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **changes}


def recipe_command(recipe, *flags, processes=1, data=None, output_dir=None, launcher="accelerate"):
    """The command line of a recipe on the nano Whisper; flags that are given win over those that are filled in."""
    command = [sys.executable]
    if launcher == "accelerate":
        command += ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--mixed_precision", "no"]
        command += ["--num_machines", "1", "--dynamo_backend", "no"]
        command += ["--multi_gpu"] if processes > 1 else []
    command += [str(ROOT / "recipes" / recipe / "run.py"), str(ROOT / "recipes" / recipe / "demo.yaml")]
    if data is not None:
        command += ["--dataset_name", str(data), "--retention_share", "0"]
    if output_dir is not None:
        command += ["--output_dir", str(output_dir)]
    return command + [str(flag) for flag in flags]


def launch(recipe, *flags, env=None, check=True, **options):
    """Launches a recipe and returns the finished process, its output as text."""
    done = subprocess.run(
        recipe_command(recipe, *flags, **options), cwd=ROOT, env=environment(**(env or {})), text=True,
        capture_output=True, timeout=600,
    )  # fmt: skip
    if check and done.returncode:
        pytest.fail(f"{' '.join(done.args)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done
