"""The way through the Hub: model and dataset come from a Hub on the loopback interface, and the run goes there."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import NANO, launch
from loopback_hub import ALWAYS, TOKEN, LoopbackHub, User

FLAGS = ["--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
FLAGS += ["--report_to", "none", "--group_columns", "speaker", "--per_device_train_batch_size", 4]


@pytest.fixture(scope="module")
def hub(few_digits, tmp_path_factory):
    """A Hub with the nano Whisper, and the digits as a private parquet dataset."""
    repos = tmp_path_factory.mktemp("hub")
    shutil.copytree(NANO, repos / "models/acme/nano", ignore=shutil.ignore_patterns("*.py", "*.yaml", "results*.json"))
    for split in ("train", "validation", "test"):
        folder = few_digits / split
        with (folder / "metadata.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        audio = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
        table = pa.table({"audio": audio, **{name: [row[name] for row in rows] for name in ("text", "speaker")}})
        target = repos / f"datasets/acme/digits/data/{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(table, target)
    (repos / "datasets/acme/digits/README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    with LoopbackHub(repos, private=["acme/digits"]) as hub:
        yield hub


def environment(hub, home, token=TOKEN):
    """HF_HUB_OFFLINE of the suite does not hold here."""
    return {**hub.env(home, token), "HF_HUB_OFFLINE": "0", "HFSPEECH_HUB_TRIES": "1"}


def run(hub, home, output_dir, *flags, token=TOKEN, **options):
    """Launches the LoRA recipe against the loopback Hub."""
    return launch(
        "whisper_lora", "--model_name_or_path", "acme/nano", *FLAGS, *flags,
        data="acme/digits", output_dir=output_dir, env=environment(hub, home, token), **options,
    )  # fmt: skip


def command(hub, home, *args):
    """Runs Python with arguments against the loopback Hub, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *args], env=environment(hub, home), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_from_the_hub_and_back(hub, tmp_path):
    home = tmp_path / "home"
    hub.fail("POST", "/commit/", status=503, times=ALWAYS)
    done = run(
        hub, home, tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", "acme/tuned", "--hub_private_repo", "true",
        "--hub_tag", "v1", "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", 2,
    )  # fmt: skip
    # The Hub is away when it is needed: the run ends well all the same, and says how to push it later.
    assert "the Hub answered 503" in done.stderr
    assert len(hub.repo("models", "acme/tuned").commits) == 1
    (later,) = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("hfspeech push ")]
    hub.faults.clear()
    told = command(hub, home, "-m", "hfspeech.cli", *shlex.split(later)[1:])
    assert f"Pushed to {hub.endpoint}/acme/tuned/tree/v1" in told and hub.repo("models", "acme/tuned").private
    files = hub.files("models", "acme/tuned", "v1")
    assert {"README.md", "run.json", "adapter_model.safetensors", "last-checkpoint/optimizer.pt"} <= set(files)
    for path in files:
        content = hub.read("models", "acme/tuned", path)
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content, path
    imports = "import numpy; from peft import PeftModel; from transformers import WhisperForConditionalGeneration, pipeline"
    heard = "pipeline('automatic-speech-recognition', 'acme/tuned')({'raw': numpy.zeros(16000), 'sampling_rate': 16000})"
    code = told.split("model = ")[1].strip()
    loaded = command(hub, tmp_path / "elsewhere", "-c", f"{imports}; print(type({code}).__name__, *{heard})")
    assert 'revision="v1"' in code and loaded.strip() == "PeftModel text"
    # Whoever reads the card makes the model again: the command that it names, from what is on the Hub alone.
    again = re.search(r"hfspeech reproduce \S+", hub.read("models", "acme/tuned", "README.md").decode())[0]
    told = command(hub, home, "-m", "hfspeech.cli", *shlex.split(again)[1:], "--output_dir", str(tmp_path / "again"))
    assert "equal to the digit" in told
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == hub.read(
        "models", "acme/tuned", "adapter_model.safetensors"
    )
    results = json.loads((tmp_path / "run/run.json").read_text())
    model = {"name_or_path": "acme/nano", "revision": "main", "commit": hub.commit("models", "acme/nano")}
    model |= {"fingerprint": None, "license": "apache-2.0", "window_s": 5}  # the commit says which weights
    assert model.items() <= results["model"].items()
    dataset = results["rows"]["account"]["datasets"][0]
    assert dataset["commit"] == hub.commit("datasets", "acme/digits") and dataset["license"] == "cc-by-4.0"
    assert {"train": 24, "validation": 6, "test": 8}.items() <= results["rows"].items()
    adapter = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "acme/nano"
    # What a run leaves behind must not carry the token.
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_push_that_cannot_succeed_stops_the_run_before_it_begins(hub, tmp_path):
    hub.users["hf_readonly"] = User("tester", "read")
    done = run(
        hub,
        tmp_path / "home",
        tmp_path / "run",
        "--push_to_hub",
        "true",
        token="hf_readonly",
        check=False,
        processes=2,
    )
    assert done.returncode and done.stderr.count("Your token may only read") == 1
    assert not (tmp_path / "run/run.json").exists()


def test_the_same_dataset_streamed(hub, tmp_path):
    run(hub, tmp_path / "home", tmp_path / "run", "--streaming", "true")
    results = json.loads((tmp_path / "run/run.json").read_text())
    assert results["rows"]["train"] is None and results["rows"]["test"] == 8
    assert results["train"]["steps"] == 2 and results["train"]["audio_seconds"] > 0
