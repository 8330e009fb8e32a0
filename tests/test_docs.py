"""What the documents say is so: tables equal their records, commands parse, links lead somewhere."""

import importlib.util
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

from hfspeech.arguments import (
    DataArguments,
    LoraArguments,
    SpeechT5Arguments,
    SpeechT5TrainingArguments,
    WhisperArguments,
    WhisperTrainingArguments,
    parse_arguments,
    read_arguments_file,
)
from hfspeech.cli import _build_parser

sys.path.insert(0, str(ROOT / "docs"))
_spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)

DOCUMENTS = render.documents()
RECORDS = sorted([*(ROOT / "recipes").glob("*/*.json"), *(ROOT / "assets").glob("nano_*/results*.json")])
BENCHES = sorted((ROOT / "bench/results").glob("*.json"))


def commands():
    for path in DOCUMENTS:
        for line in path.read_text().splitlines():
            line = re.split(r"\s+# ", line.strip().strip("`"))[0]
            if line.startswith(
                ("accelerate launch recipes/", "hfspeech ", "make ", "python assets/", "python bench/")
            ):
                yield pytest.param(line, id=f"{path.relative_to(ROOT)}: {line[:60]}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_equal_their_records(path):
    text = path.read_text()
    assert render.rendered(text) == text, "run: python docs/render.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_result_is_typed_into_a_table(path):
    by_hand = render.BLOCK.sub("", path.read_text())
    rows = [line for line in by_hand.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\d ?(%|dB|×)(?!\w)", row)]


def test_an_aim_gives_way_to_a_record(monkeypatch, tmp_path):
    aims = json.loads((ROOT / "docs/aims.json").read_text())
    assert {aim["recipe"] for aim in aims} == {path.parent.name for path in (ROOT / "recipes").glob("*/args.yaml")}
    for aim in aims:
        text = (ROOT / f"recipes/{aim['recipe']}/args.yaml").read_text()
        assert aim["model"] in text
    (tmp_path / "recipes/whisper_lora").mkdir(parents=True)
    (tmp_path / "aims.json").write_text(json.dumps(aims))
    record = (ROOT / "recipes/whisper_lora/demo.json").read_text()
    (tmp_path / "recipes/whisper_lora/args.json").write_text(record)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    table = render.aims_table("aims.json")
    reached = render.rate_text(json.loads(record)["after"])
    assert f"test: WER **{reached}**" in table and table.count("an aim: no record yet") == len(aims) - 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    """Every command in every document names a file that exists and settings that there are."""
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+|\$\(BIN\)/installed):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1].replace(".venv/bin", "$(BIN)") in targets
    elif words[0] == "hfspeech":
        args = _build_parser()[0].parse_args(words[1:])
        if args.command == "check":
            parse_run(ROOT / args.arguments_file, args.flags)
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
    else:
        script, flags = ROOT / words[2], words[3:]
        assert script.exists()
        file = ROOT / flags.pop(0) if flags and flags[0].endswith(".yaml") else script.with_name("args.yaml")
        parse_run(file, flags)


def parse_run(arguments_file, flags):
    settings = read_arguments_file(arguments_file)
    is_speecht5 = "speecht5" in str(arguments_file)
    family = (
        (SpeechT5Arguments, SpeechT5TrainingArguments) if is_speecht5 else (WhisperArguments, WhisperTrainingArguments)
    )
    classes = (DataArguments, *family, LoraArguments)
    parse_arguments(settings, list(flags), classes)


@pytest.mark.parametrize("path", [*RECORDS, *BENCHES], ids=lambda path: str(path.relative_to(ROOT)))
def test_records_are_whole(path):
    """Date, commit, command, hardware and versions stand in every record, and no path of one machine."""
    record = json.loads(path.read_text())
    made = record["environment"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["date"])
    assert re.fullmatch(r"[0-9a-f]{40}\+?", made["commit"])
    assert made["command"].startswith("python bench/" if path in BENCHES else "accelerate launch recipes/")
    assert made["hardware"]["cores"] and made["versions"]["torch"]
    assert not re.search(r'"(/[a-z]+/|\.\./)', path.read_text())


def test_the_plot_is_drawn_from_the_records():
    speed = render.speed
    assert speed.digest() in speed.PLOT.read_text(), "run: python docs/speed.py"
