"""The estimated mean opinion score: torchaudio's own network, of random weights, from its own place in the cache."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import VOICE, launch
from torchaudio.models import squim_subjective_base

from hfspeech.audio import decode
from hfspeech.errors import UserError
from hfspeech.models.opinion import WEIGHTS, load_mos_model

SHORT = ["--max_steps", 1, "--eval_steps", 1, "--save_steps", 1, "--per_device_train_batch_size", 4]


@pytest.fixture(scope="module")
def squim(tmp_path_factory):
    """(folder for TORCH_HOME, the network in it)"""
    home = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    model = squim_subjective_base().eval()
    (home / "hub/torchaudio/models").mkdir(parents=True)
    torch.save(model.state_dict(), home / "hub/torchaudio/models" / WEIGHTS)
    return home, model


def test_a_run_says_what_listeners_would(squim, short_voice, tmp_path):
    home, model = squim
    flags = ["--mos_model", "squim", "--group_columns", "speaker", "--report_to", "none"]
    flags += ["--max_eval_samples", 1, "--max_test_samples", 3]
    done = launch(
        "speecht5_lora", *SHORT, *flags, data=short_voice, output_dir=tmp_path / "run", env={"TORCH_HOME": str(home)}
    )
    record = json.loads((tmp_path / "run/run.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        score = record[when]
        assert score["mos"] == pytest.approx(np.mean([row[f"{when}_mos"] for row in rows]))
        assert score["mos_low"] < score["mos"] < score["mos_high"] and score["measured_rows"]["mos"] == 3
        assert score["groups"]["speaker"]["slt"]["mos"] == score["mos"]
    assert record["models"]["mos_model"]["name_or_path"] == "squim"
    assert any("eval_mos" in entry for entry in record["train"]["log"])

    sounds = [torch.from_numpy(decode(path)) for path in sorted((tmp_path / "run/samples").glob("*_recording.wav"))]
    with torch.no_grad():
        true = [model(one[None], other[None]).item() for one, other in zip(sounds, sounds[1:] + sounds[:1])]
    ceiling = record["after"]["ceiling"]
    assert ceiling["recordings"]["mos"] == pytest.approx(np.mean(true), abs=1e-4)
    assert ceiling["vocoded"]["mos"] != ceiling["recordings"]["mos"]

    card = (tmp_path / "run/README.md").read_text()
    for text in (done.stdout, card):
        title = "mean opinion score, estimated"
        (line,) = [line for line in text.splitlines() if line.lstrip("| ").startswith(title)]
        for shown in (record["before"], record["after"], ceiling["vocoded"]):
            assert f"{shown['mos']:.2f}" in line
    assert f"the true recordings {ceiling['recordings']['mos']:.2f}" in card


def test_silence_is_no_speech_to_have_an_opinion_of(squim, monkeypatch):
    from hfspeech.metrics import SynthesisScore

    home, model = squim
    monkeypatch.setenv("TORCH_HOME", str(home))
    speech = decode(VOICE / "test/00000.ogg")
    sounds = [np.zeros(8000, np.float32), speech[9000:9512]]  # the other is far shorter than the network takes
    rows = [
        {"index": i, "text": "one", "waveform": sound, "reference": speech, "vocoded": speech, "is_unfinished": False}
        for i, sound in enumerate(sounds)
    ]
    score = SynthesisScore(
        lambda waveforms: ["one"] * len(waveforms),
        lambda waveforms: torch.ones(len(waveforms), 1),
        rate=load_mos_model("squim"),
    )
    result = score(rows)
    assert rows[0]["mos"] is None and result["mos"] == rows[1]["mos"] and result["measured_rows"]["mos"] == 1


def test_a_file_that_holds_something_else(tmp_path):
    file = tmp_path / WEIGHTS
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other")
    for content in (b"half", b"", (tmp_path / "other").read_bytes(), pickle.dumps([print], protocol=2)):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not hold the weights of torchaudio's SQUIM_SUBJECTIVE"):
            load_mos_model(str(file))
