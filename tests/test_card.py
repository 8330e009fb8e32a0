"""The model card: read back by the Hub's own tools, and every number in it that of the record."""

import copy
import json
import re

import pytest
from conftest import ROOT, VOICE
from huggingface_hub import ModelCard
from PIL import Image

from hfspeech.data.sources import open_source
from hfspeech.publish.card import changed_settings, draw_curve, model_card
from hfspeech.publish.facts import Facts
from hfspeech.publish.privacy import public_record

DEMOS = sorted((ROOT / "recipes").glob("*/*.json"))


def demo(recipe):
    """The record of a demo, with what has been kept only since it was made."""
    record = json.loads((ROOT / "recipes" / recipe / "demo.json").read_text())
    record["rows"]["account"]["splits"]["train"]["speakers"] = 3
    record["model"] |= {"window_s": 5, "license": "apache-2.0"}
    record["after"].setdefault("unfinished", 0)
    if recipe.startswith("whisper"):
        record["arguments"]["encoder_window"] = "auto"
        record["after"]["unpadded"] = copy.deepcopy(record["before"])
    return record


def from_the_hub(record):
    record["model"] |= {"name_or_path": "acme/nano-whisper", "commit": "0" * 40}
    return record


def card_of(record, repo_id="me/mine", **options):
    return model_card(Facts(public_record(copy.deepcopy(record)), repo_id, **options))


def tables(card):
    """Returns the rows of all tables of a card, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def numbers(cell):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]


def rate(score, name="wer"):
    bounds = [score[f"{name}_low"], score[f"{name}_high"]]
    return [round(100 * value, 1) for value in (score[name], *bounds) if value is not None]


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_hub_reads_the_head_of_the_card(path):
    """Records from before much of what is kept now, too."""
    record = json.loads(path.read_text())
    speaks, is_lora = "vocoder" in record["arguments"], "lora_r" in record["arguments"]
    data = ModelCard(card_of(record)).data
    assert data.pipeline_tag == ("text-to-speech" if speaks else "automatic-speech-recognition")
    assert data.library_name == ("peft" if is_lora else "transformers")
    assert data.language == "en" and data.datasets is None  # no invention
    assert data.license == record["model"].get("license")
    assert data.base_model is None  # a folder is no id, however much it looks like one
    values = {
        result.metric_name: result.metric_value for result in data.eval_results if "(old" not in result.dataset_name
    }
    after = record["after"]
    if speaks:
        assert values["words misheard, %"] == pytest.approx(100 * after["wer"], abs=1e-4)
        assert values["mel-cepstral distortion, dB"] == pytest.approx(after["mcd"], abs=1e-4)
        assert values["stops where it should, %"] == pytest.approx(100 * after["stop"]["ok"], abs=1e-4)
    else:
        for name, key in (
            ("WER", "wer"),
            ("CER", "cer"),
            ("WER as written", "raw_wer"),
            ("CER as written", "raw_cer"),
        ):
            assert values[f"{name}, %"] == pytest.approx(100 * after[key], abs=1e-4)
    for column, scores in after["groups"].items():
        for value, score in scores.items():
            assert values[f"WER, %, {column}: {value}"] == pytest.approx(100 * score["wer"], abs=1e-4)
    old = [result.metric_value for result in data.eval_results if "(old" in result.dataset_name]
    assert bool(old) == bool(record.get("retention"))
    if old:
        assert old[0] == pytest.approx(100 * record["retention"]["after"]["wer"], abs=1e-4)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_cell_is_of_the_record(path):
    record = json.loads(path.read_text())
    rows, before, after = tables(card_of(record)), record["before"], record["after"]
    if "vocoder" in record["arguments"]:
        vocoded = after["ceiling"]["vocoded"]
        assert [numbers(cell) for cell in rows["words misheard"]] == [
            rate(before),
            rate(after),
            rate(vocoded | {"wer_low": None, "wer_high": None}),
        ]
        for cell, score in zip(rows["mel-cepstral distortion"], (before, after)):
            assert numbers(cell) == [round(score[name], 2) for name in ("mcd", "mcd_low", "mcd_high")]
        assert numbers(rows["stops where it should"][1]) == [round(100 * after["stop"]["ok"], 1)]
    else:
        scores = {"test": (before, after)}
        for column, values in after["groups"].items():
            scores |= {
                f"{column}: {value}": (before["groups"][column][value], score) for value, score in values.items()
            }
        if record["retention"]:
            scores["old condition"] = record["retention"]["before"], record["retention"]["after"]
        for title, (one, other) in scores.items():
            found = rows[title]  # of the two tables with a row called test, the data's comes last
            if title in ("test", "old condition"):
                found = re.search(rf"^\| {title} \|(.*%.*)\|$", card_of(record), re.M)[1].split("|")
            assert [numbers(found[0])[0], numbers(found[1])[0]] == [other["rows"], other["words"]]
            assert [numbers(cell) for cell in found[2:]] == [
                rate(s, name) for name in ("wer", "cer") for s in (one, other)
            ]
    split = record["rows"]["account"]["splits"]["train"]
    assert [numbers(cell) for cell in rows["train"][:2]] == [[split["rows"]], [split["hours"]]]
    for name, (value, _) in changed_settings(record).items():
        shown = rows[f"`{name}`"][0]
        assert shown == (value if isinstance(value, str) else json.dumps(value))


RATES = ("wer", "wer_low", "wer_high", "cer", "cer_low", "cer_high")
RUN = (
    "train.seconds", "train.audio_seconds", "train.audio_seconds_per_second", "train.steps", "train.best_step",
    "train.peak_rss_bytes", "environment.processes", "environment.hardware.cores", "arguments.seed",
    "rows.account.splits.test.rows", "rows.account.splits.train.hours", "rows.account.splits.train.speakers",
)  # fmt: skip
COUNTS = ("words", "rows", "raw_wer", "raw_cer", "unfinished")


def told_of_whisper():
    yield from (f"{part}.{name}" for part in ("before", "after", "after.unpadded") for name in RATES)
    yield from (f"retention.{part}.{name}" for part in ("before", "after") for name in RATES)
    yield from (f"{part}.groups.condition.seen voice.{name}" for part in ("before", "after") for name in RATES)
    yield from (f"after.{name}" for name in (*COUNTS, "substitutions", "insertions", "deletions"))


def told_of_speecht5():
    means = [f"{name}{end}" for name in ("mcd", "log_f0_rmse", "speaker_similarity", "duration_ratio")
             for end in ("", "_low", "_high")]  # fmt: skip
    yield from (f"{part}.{name}" for part in ("before", "after") for name in (*RATES, *means, "stop.ok", "stop.never"))
    yield from (f"after.{name}" for name in (*COUNTS, "repeated_words", "skipped_words", "ceiling.recordings.wer"))
    yield from (f"after.ceiling.vocoded.{name}" for name in ("wer", "cer", "mcd", "speaker_similarity"))


@pytest.mark.parametrize("recipe, told", [("whisper_lora", told_of_whisper()), ("speecht5_full", told_of_speecht5())])
def test_no_figure_is_made_up(recipe, told):
    """Whatever figure of the record changes, the card changes with it."""
    record = demo(recipe)
    card = card_of(record)
    for path in (*RUN, *told):
        *steps, name = path.split(".")
        other = copy.deepcopy(record)
        place = other
        for step in steps:
            place = place[step]
        place[name] = place[name] * 3 + 1
        assert card_of(other) != card, path


def test_what_the_card_says_of_a_model_on_the_hub():
    record = from_the_hub(demo("whisper_lora"))
    head = ModelCard(card_of(record)).data.to_dict()
    assert head["base_model"] == "acme/nano-whisper" and head["base_model_relation"] == "adapter"
    assert head["license"] == "apache-2.0"  # as the base's card says
    merged = card_of(record, "me/my-whisper", is_merged=True)
    head = ModelCard(merged).data.to_dict()
    assert head["base_model_relation"] == "finetune" and head["library_name"] == "transformers"
    assert "hfspeech reproduce me/my-whisper" in merged and "has been merged" in merged
    facts = Facts(public_record(demo("speecht5_full")), "me/my-voice")
    sound = "https://huggingface.co/me/my-voice/resolve/main/samples/1_after.wav"
    assert f'<audio controls src="{sound}"></audio>' in model_card(
        facts, ["samples/0_after.wav", "samples/1_after.wav"]
    )


def test_the_code_suits_what_there_is():
    """test_package.py runs the code of the other kinds."""
    adapter = from_the_hub(demo("speecht5_lora"))
    for facts, has_voices in ((Facts(adapter, "me/x"), False), (Facts(adapter), True)):
        code = re.search(r"```python\n(.*?)```", model_card(facts, has_voices=has_voices), re.S)[1]
        compile(code, "card", "exec")
        assert 'from_pretrained("acme/nano-whisper", revision="' in code and "merge_and_unload" in code
        assert 'load_file("outputs/speecht5_demo/speaker_embeddings.safetensors")' in code or not has_voices
        assert 'numpy.load("voice.npy")' in code or has_voices


def test_limits_follow_from_the_record():
    record = demo("whisper_lora")
    record["after"]["unfinished"] = 3
    record["rows"]["account"]["splits"]["train"]["dropped"] = {
        "longer than 5 s": {"count": 7, "example": "private.wav: 9 s"}
    }
    record["rows"]["bad_audio"] = {"train": {"count": 2, "examples": ["secret.wav: 0 samples"]}}
    record["arguments"]["load_in_8bit"] = True
    card = card_of(record)
    assert "In 3 of 160 test rows the text was cut off" in card
    assert "7 longer than 5 s" in card and "private.wav" not in card
    assert "2 recordings could not be read (train)" in card and "secret.wav" not in card
    assert "held in 8 bits" in card and "padded no further than they need" in card
    assert "it is worst on" in card and "not measured" not in card
    record["retention"] = {}
    assert "What it has forgotten was not measured." in card_of(record)
    many = {f"s{number}": {**record["after"], "wer": number / 100} for number in range(30)}
    record["after"]["groups"] = {"speaker": many}
    card = card_of(record)
    assert "speaker: s29" in card and "speaker: s3 " not in card and "the 12 worst of 30 values of speaker" in card
    assert len(ModelCard(card).data.eval_results) < 50


def test_energy_is_an_estimate_by_a_stated_formula():
    record = demo("whisper_lora")
    record["train"]["seconds"] = 7200.0
    record["environment"]["hardware"] |= {"cores": 4, "gpus": []}
    card = card_of(record)
    on_cpu = (
        "not a measurement: 80 Wh. It is the 2.0 hours of training times 4 × 10 W, an assumption for each CPU core"
    )
    assert on_cpu in card
    record["environment"]["hardware"]["gpus"] = ["NVIDIA H100 80GB HBM3"] * 8
    record["environment"]["processes"] = 16  # on two such machines
    h100 = "NVIDIA H100 80GB HBM3"
    card = card_of(record)
    assert f"22 kWh. It is the 2.0 hours of training times 16 × 700 W, an assumption for each {h100}," in card
    assert f"GPUs: 16 × {h100}." in card
    record["arguments"]["use_cpu"] = True  # what the machine has besides was not used
    assert on_cpu in card_of(record) and h100 not in card_of(record)


def test_the_kinds_of_record_that_are_to_come():
    record = demo("whisper_lora")
    record |= {"recipe": "recipes/whisper_lora/run.py", "timings": {"train": 12.0, "after": 3.0}}
    record["sources"] = {name: "default" for name in record["arguments"]}
    record["sources"] |= {
        "learning_rate": "recipes/whisper_lora/demo.yaml",
        "max_steps": "command line",
        "bf16": "hardware",
    }
    record["environment"] |= {"commit": "0" * 40, "dirty": True}
    record["environment"]["hardware"]["memory_bytes"] = 64 * 2**30
    record["rows"]["account"]["datasets"][0] |= {"license": "cc0-1.0"}
    for name, split in record["rows"]["account"]["splits"].items():
        split["fingerprint"] = "sha256:abc123" if name == "test" else None
    record["model"]["fingerprint"] = "sha256:def456"
    card = card_of(record)
    assert set(changed_settings(record)) == {"learning_rate", "max_steps"}
    assert (
        "| `max_steps` | 240 | command line |" in card
        and "64 GB of memory" in card
        and "train 12 s, after 3 s" in card
    )
    assert "license cc0-1.0" in card and "with changes that are in no commit" in card
    assert "Fingerprints: base model `sha256:def456`, rows of test `sha256:abc123`." in card


@pytest.mark.parametrize("head, found", [
    ("---\nlicense: cc-by-4.0\n---\n# Mine", "cc-by-4.0"),
    ("---\nlicense:\n- cc-by-4.0\n- mit\n---\n", "cc-by-4.0, mit"),
    ("---\nlanguage: en\n---\n", None),
    ("---\n- a list\n---\n", None),
    ("---\nlicense: [\n---\n", None),
    ("# No head", None),
])  # fmt: skip
def test_the_license_of_a_folder_is_what_its_readme_states(head, found, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.csv").write_text((VOICE / "train/metadata.csv").read_text())
    (tmp_path / "README.md").write_text(head)
    assert open_source(str(tmp_path)).record.get("license") == found
    assert open_source(str(tmp_path / "train/metadata.csv")).record.get("license") is None  # its own folder has none


def test_a_curve_without_evaluations_is_drawn(tmp_path):
    draw_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], 2, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[1] > 400
