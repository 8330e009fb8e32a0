"""The way through the Hub: model, adapter and dataset loaded by the real code from a Hub on the loopback interface."""

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import NANO, launch
from loopback_hub import TOKEN, LoopbackHub

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
    with LoopbackHub(repos, private=["acme/digits"]) as hub:
        yield hub


def run(hub, home, output_dir, *flags):
    """Launches the LoRA recipe against the loopback Hub; HF_HUB_OFFLINE of the suite does not hold for it."""
    env = {**hub.env(home, TOKEN), "HF_HUB_OFFLINE": "0"}
    return launch(
        "whisper_lora", "--model_name_or_path", "acme/nano", *FLAGS, *flags,
        data="acme/digits", output_dir=output_dir, env=env,
    )  # fmt: skip


def test_model_and_private_dataset_come_from_the_hub(hub, tmp_path):
    run(hub, tmp_path / "home", tmp_path / "run")
    results = json.loads((tmp_path / "run/run.json").read_text())
    assert results["model"] == {
        "name_or_path": "acme/nano",
        "revision": "main",
        "commit": hub.commit("models", "acme/nano"),
    }
    assert results["rows"]["account"]["datasets"][0]["commit"] == hub.commit("datasets", "acme/digits")
    assert {"train": 24, "validation": 6, "test": 8}.items() <= results["rows"].items()
    adapter = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "acme/nano"
    # What a run leaves behind must not carry the token.
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_same_dataset_streamed(hub, tmp_path):
    run(hub, tmp_path / "home", tmp_path / "run", "--streaming", "true")
    results = json.loads((tmp_path / "run/run.json").read_text())
    assert results["rows"]["train"] is None and results["rows"]["test"] == 8
    assert results["train"]["steps"] == 2 and results["train"]["audio_seconds"] > 0
