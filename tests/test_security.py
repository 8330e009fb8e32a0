"""What comes from others is data: none of it is run, leads out of its folder, or carries a secret away."""

import ast
import csv
import io
import json
import logging
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import NANO, NANO_SPEECHT5, ROOT, recipe_command
from loopback_hub import TOKEN, LoopbackHub

from hfspeech import audio, voices
from hfspeech.arguments import DataArguments, LoraArguments, WhisperArguments
from hfspeech.cli import main
from hfspeech.data import load_speech, load_split
from hfspeech.errors import UserError
from hfspeech.models.lora import add_lora
from hfspeech.models.speecht5 import load_speecht5_for_inference
from hfspeech.models.vocoders import load_vocoder
from hfspeech.models.whisper import load_for_inference, load_whisper
from hfspeech.runs import finish_checkpoint, last_checkpoint
from hfspeech.runs.checkpoints import MANIFEST_FILE

SOURCES = [path for folder in ("src", "recipes", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
CODE_NAMES = ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.load", "yaml.unsafe_load", "yaml.full_load",
              "shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile", "urllib.request.urlopen")  # fmt: skip


class Pickled:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """A file that must not appear; there is nobody to ask for leave either."""
    path = tmp_path / "code_was_run"
    torch.save({"x": Pickled(path)}, tmp_path / "proof.pt")
    torch.load(tmp_path / "proof.pt", weights_only=False)
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def calls(path):
    """Yields the calls of a file, as (name with dots, {keyword: constant or None})."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
            yield ast.unparse(node.func), given


# Code


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    for name, given in calls(path):
        assert given.get("trust_remote_code", False) is False, name
        assert name not in CODE_NAMES or (name == "torch.load" and given.get("weights_only") is True)
        assert name != "np.load" or given.get("allow_pickle") is False
        if name.endswith(".from_pretrained") and (ROOT / "src") in path.parents:
            owner = name.removesuffix(".from_pretrained").split(".")[-1]
            if owner.startswith("Auto") or owner.endswith("Processor"):
                assert given.get("trust_remote_code") is False, name
            elif owner in (
                "WhisperForConditionalGeneration",
                "SpeechT5ForTextToSpeech",
                "SpeechT5HifiGan",
                "WavLMForXVector",
                "kind",
            ):
                assert given.get("use_safetensors") is True, name
            else:  # configurations, the tokenizer that was written just now, an adapter that is looked at before
                assert owner in ("GenerationConfig", "SpeechT5HifiGanConfig", "type(tokenizer)", "PeftModel"), name


def model_with_code(folder, marker, file, **settings):
    """Copies the nano Whisper and adds a program, named in one of its files."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.py"))
    classes = {"Config": "WhisperConfig", "Tokenizer": "WhisperTokenizer", "Extractor": "WhisperFeatureExtractor"}
    imports = "\n".join(f"from transformers import {theirs} as {name}" for name, theirs in classes.items())
    code = f"open({str(marker)!r}, 'w')\n{imports}\ndef generate(*args, **kwargs): pass\n"
    (folder / "code.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    maps = {
        "AutoConfig": "code.Config",
        "AutoTokenizer": ["code.Tokenizer", None],
        "AutoFeatureExtractor": "code.Extractor",
    }
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**found, "auto_map": maps, **settings}))
    return folder


EXTRACTOR = {
    "feature_extractor": {
        "feature_extractor_type": "Extractor",
        "auto_map": {"AutoFeatureExtractor": "code.Extractor"},
    }
}


@pytest.mark.parametrize(
    "file, settings, is_refused",
    [
        ("config.json", {"model_type": "strange"}, True),
        ("config.json", {}, False),
        ("config.json", {"attn_implementation": "acme/kernel", "_attn_implementation": "acme/kernel"}, False),
        ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"}, False),
        ("processor_config.json", EXTRACTOR, True),
        ("generation_config.json", {"custom_generate": "."}, False),
    ],
)
def test_the_program_of_a_model_is_not_run(tmp_path, marker, monkeypatch, file, settings, is_refused):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    folder = model_with_code(tmp_path / "model", marker, file, **settings)
    if is_refused:
        with pytest.raises(UserError, match="brings a program of its own, and none is run"):
            load_for_inference(folder)
    else:
        load_for_inference(folder)
    assert not asked and not marker.exists()


def test_a_speaker_encoder_of_speechbrain_is_its_own_alone(tmp_path, monkeypatch):
    """Its hyperparams.yaml is run: a folder here that is called so, or leads elsewhere, is no such encoder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speechbrain/mine").mkdir(parents=True)
    for name in ("speechbrain/mine", "speechbrain/../speechbrain/mine"):
        with pytest.raises(UserError) as error:
            voices.load_speaker_encoder(name)
        assert "pip install speechbrain" not in str(error.value)


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
@pytest.mark.parametrize(
    "source, load",
    [
        (NANO, load_for_inference),
        (NANO, lambda folder: load_whisper(WhisperArguments(str(folder), language="en"))),
        (NANO_SPEECHT5, load_speecht5_for_inference),
    ],
    ids=["whisper", "whisper to train", "speecht5"],
)
def test_pickled_weights_are_refused(tmp_path, marker, source, load, name):
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Pickled(marker)}, folder / name)
    with pytest.raises(UserError, match=f"has its weights only in {name}, a pickle, which could run any program"):
        load(folder)


def test_other_networks_are_refused_as_pickles(tmp_path, marker):
    from transformers import SpeechT5HifiGanConfig, Wav2Vec2FeatureExtractor, WavLMConfig

    SpeechT5HifiGanConfig().save_pretrained(tmp_path / "vocoder")
    WavLMConfig(xvector_output_dim=512).save_pretrained(tmp_path / "encoder")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "encoder")
    for name, load in (("vocoder", load_vocoder), ("encoder", voices.load_speaker_encoder)):
        torch.save({"x": Pickled(marker)}, tmp_path / name / "pytorch_model.bin")
        with pytest.raises(UserError, match="only in pytorch_model.bin, a pickle"):
            load(str(tmp_path / name))


def run_advice(message, monkeypatch):
    """Runs the command that a sentence gives, in this process."""
    _, option, code, *arguments = shlex.split(message.split("`")[1])
    assert option == "-c"
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})


def test_the_advice_converts_a_model(tmp_path, monkeypatch):
    folder = shutil.copytree(NANO, tmp_path / "my model")
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_for_inference(folder)
    run_advice(str(error.value), monkeypatch)
    load_for_inference(folder)


def test_the_advice_converts_an_adapter_and_no_pickled_one_is_loaded(tmp_path, monkeypatch, marker):
    model, processor = load_whisper(WhisperArguments(str(NANO), language="en"))
    adapter = tmp_path / "adapter"
    add_lora(model, LoraArguments(lora_r=2)).save_pretrained(adapter)
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Pickled(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="only in adapter_model.bin, a pickle"):
        load_for_inference(adapter)
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(UserError) as error:
        load_for_inference(adapter)
    run_advice(str(error.value), monkeypatch)
    load_for_inference(adapter)


def test_a_pickled_array_is_no_speaker_embedding(tmp_path, marker):
    np.save(tmp_path / "voice.npy", np.array([Pickled(marker)] * 512, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not an .npy file of numbers"):
        voices._from_file(tmp_path / "voice.npy", {})
    assert not marker.exists()
    with pytest.raises(SystemExit):
        main(["synthesize", str(NANO_SPEECHT5), "--text", "one", "--output", str(tmp_path / "a.wav"), "--vocoder", "griffin_lim",
              "--speaker_embedding", str(tmp_path / "voice.npy")])  # fmt: skip


# Runs: checkpoints, secrets

QUICK = ["--max_steps", "2", "--save_steps", "1", "--eval_on_start", "false", "--eval_strategy", "no", "--use_cpu",
         "--dataloader_num_workers", "0", "--per_device_train_batch_size", "2", "--max_test_samples", "2",
         "--load_best_model_at_end", "false"]  # fmt: skip
SECRET = "hf_thisMustNotAppearAnywhere"


@pytest.fixture
def recipe(monkeypatch, tmp_path, few_digits, capfd):
    """Runs a recipe's main in this process; returns all that it printed, and its exit code."""
    notes = logging.getLogger("hfspeech")
    before = notes.handlers, notes.propagate, notes.level
    monkeypatch.chdir(ROOT)

    def run(*flags, output_dir=tmp_path / "run"):
        command = recipe_command(
            "whisper_lora", *QUICK, *flags, data=few_digits, output_dir=output_dir, launcher="python"
        )
        monkeypatch.setattr(sys, "argv", command[1:])
        code = 0
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            code = end.code
        return "".join(capfd.readouterr()), code

    yield run
    notes.handlers, notes.propagate = before[:2]
    notes.setLevel(before[2])


def seal(checkpoint):
    """Makes the sums of a checkpoint right again, as whoever hands it on could."""
    (checkpoint / MANIFEST_FILE).unlink()
    finish_checkpoint(checkpoint.rename(checkpoint.with_name("part")), checkpoint)


def test_no_pickle_of_a_checkpoint_is_run_and_no_file_holds_the_token(recipe, tmp_path, monkeypatch, marker):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    printed, code = recipe("--report_to", "tensorboard")
    assert code == 0 and SECRET not in printed
    folder = tmp_path / "run"
    written = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"training_args.bin", "run.json", "predictions.jsonl", "README.md"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]

    shutil.rmtree(folder / "checkpoint-2")
    record = json.loads((folder / "run.json").read_text())
    del record["train"]  # it says that the run is finished
    (folder / "run.json").write_text(json.dumps(record))
    whole = shutil.copytree(folder, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        run = shutil.copytree(whole, tmp_path / name)
        torch.save({"x": Pickled(marker)}, run / "checkpoint-1" / name)
        seal(run / "checkpoint-1")
        printed, code = recipe(output_dir=run)
        assert code == 2 and "checkpoint-1 holds something else than numbers" in printed.splitlines()[-1]
        assert not marker.exists()
    torch.save(Pickled(marker), whole / "checkpoint-1/training_args.bin")
    seal(whole / "checkpoint-1")
    printed, code = recipe(output_dir=whole)
    assert code == 0 and "Going on from" in printed and last_checkpoint(whole, 2)


@pytest.mark.parametrize(
    "flags", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], ["--push_to_hub_token", SECRET]]
)
def test_a_token_on_the_command_line_ends_the_run_before_it_is_recorded(recipe, tmp_path, flags):
    printed, code = recipe(*flags)
    assert code == 2 and SECRET not in printed
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


# Paths


def flac(seconds=0.2, seed=0):
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).normal(size=round(16000 * seconds))
    soundfile.write(file, noise, 16000, format="FLAC")
    return file.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder `mine/data` for manifests, with a recording of its own; one outside that it may not lead to."""
    data = tmp_path / "mine/data"
    (data / "sub").mkdir(parents=True)
    (data / "own.flac").write_bytes(flac())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/private.flac").write_bytes(flac(seed=1))
    (data / "link.flac").symlink_to(tmp_path / "elsewhere/private.flac")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return data


def manifest(path, names):
    rows = [{"audio": name, "text": f"word {i}"} for i, name in enumerate(names)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        rows = [{**row, "audio": {"bytes": None, "path": row["audio"]}} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["audio", "text"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def arguments(path, **rest):
    return DataArguments(dataset_name=[str(path)], **rest)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("on_bad_audio", ["error", "skip"])
@pytest.mark.parametrize(
    "name", ["../../elsewhere/private.flac", "sub/../../../elsewhere/private.flac", "ABSOLUTE", "~/private.flac", "link.flac",
             "linked/private.flac", "linked/../elsewhere/private.flac"],
)  # fmt: skip
def test_a_path_does_not_leave_the_folder(place, suffix, on_bad_audio, name):
    outside = place.parent.parent / "elsewhere"
    name = str(outside / "private.flac") if name == "ABSOLUTE" else name
    path = manifest(place / f"test{suffix}", ["own.flac", name])
    with pytest.raises(UserError, match="Row 2 leads to .*, outside of .*: allow that with --audio_root ") as error:
        load_split(arguments(path, on_bad_audio=on_bad_audio), "test")
    advised = shlex.split(str(error.value).split("--audio_root ")[1].rstrip("."))
    assert advised == [str(outside)]
    assert len(load_split(arguments(path, audio_root=advised), "test")) == 2


def test_the_advice_covers_all_rows_but_never_everything(place, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "elsewhere" / name).mkdir()
        (tmp_path / "elsewhere" / name / "x.flac").write_bytes(flac(seed=ord(name)))
    outside = [str(tmp_path / f"elsewhere/{name}/x.flac") for name in ("a", "b")]
    with pytest.raises(UserError) as error:
        load_split(arguments(manifest(place / "test.csv", outside)), "test")
    assert str(error.value).endswith(f"--audio_root {tmp_path / 'elsewhere'}.")
    with pytest.raises(UserError) as error:
        load_split(arguments(manifest(place / "test.csv", [outside[0], "/etc/hosts"])), "test")
    assert str(error.value).endswith(f"--audio_root {tmp_path / 'elsewhere/a'}.")


def test_a_stream_stays_in_the_folder(place):
    for split in ("validation", "test"):
        (place / f"{split}.flac").write_bytes(flac(seed=len(split)))
        manifest(place / f"{split}.csv", [f"{split}.flac"])
    manifest(place / "train.csv", ["own.flac", "../../elsewhere/private.flac"])
    row = next(iter(load_speech(arguments(place, streaming=True))["train"]))
    assert row["waveform"] is None and "Row 2 leads to" in row["fatal"]


def test_no_url_is_fetched(place, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    own = place / "own.flac"
    urls = [f"file://{own}", "http://127.0.0.1:1/a.flac", "https://example.com/a.flac", "hf://datasets/acme/a/a.flac",
            "zip://a.flac::https://example.com/a.zip", "s3://bucket/a.flac"]  # fmt: skip
    for suffix in (".csv", ".jsonl", ".parquet"):
        rows = load_split(
            arguments(manifest(place / f"test{suffix}", ["own.flac", *urls]), on_bad_audio="skip"), "test"
        )
        assert len(rows) == 1
        assert rows.account["splits"]["test"]["dropped"]["bad audio"]["count"] == len(urls)
    assert not asked


def test_pictures_beside_the_audio_are_not_opened(place, monkeypatch):
    """`datasets` opens the file or URL that a row of another medium names, as soon as the row is looked at."""
    import datasets

    for kind in (datasets.Image, datasets.Video):
        monkeypatch.setattr(kind, "decode_example", lambda *_, **__: pytest.fail("it was opened"))
    features = {"audio": datasets.Audio(), "face": datasets.Image(), "text": datasets.Value("string")}
    schema = datasets.Features(features | {"duration": datasets.Value("float64")}).arrow_schema
    row = {
        "audio": {"bytes": flac(), "path": None},
        "text": "a",
        "duration": 0.2,
        "face": {"bytes": None, "path": "http://x/"},
    }
    table = pyarrow.Table.from_pylist([row], schema)
    pyarrow.parquet.write_table(table, place / "test.parquet")
    assert load_split(arguments(place / "test.parquet"), "test")[0]["waveform"] is not None


def test_a_pipe_is_not_waited_for(place):
    os.mkfifo(place / "pipe.wav")
    path = manifest(place / "test.csv", ["own.flac", "pipe.wav"])
    assert len(load_split(arguments(path, on_bad_audio="skip"), "test")) == 1


def test_ffmpeg_is_given_no_playlist(place, monkeypatch):
    """FFmpeg reads lists of other files and URLs, and fetches them."""
    given = []
    monkeypatch.setattr(audio, "_torchcodec", lambda: lambda source, **_: given.append(source) or pytest.fail("given"))
    lists = [b"#EXTM3U\n#EXTINF:1,\nhttp://example.com/a.aac\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"<MPD></MPD>",
             b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", b"[playlist]\nFile1=http://example.com/\n"]  # fmt: skip
    for content in lists:
        (place / "list.wav").write_bytes(content)
        for source in (content, str(place / "list.wav")):
            with pytest.raises(audio.BadAudio, match="not an audio file"):
                audio.decode(source)
    assert not given


def test_voices_and_names_of_a_table_stay_in_their_folders(place, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["../escaped", str(tmp_path / "escaped"), "a/../../escaped", "fine"]
    with (place / "say.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "file_name", "voice"], *(["one", name, "../../elsewhere/private.flac"] for name in names)]
        )
    command = ["synthesize", str(NANO_SPEECHT5), "--file", str(place / "say.csv"), "--output", str(out), "--vocoder",
               "griffin_lim", "--speaker_encoder", "mel_statistics"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr().err
    assert said.count("leads out of") == 3 and "allow that with --audio_root" in said
    assert sorted(tmp_path.rglob("escaped*")) == []


# What the Hub holds

ASK = """
import json, sys
from hfspeech.arguments import DataArguments
from hfspeech.data import load_speech, load_split
from hfspeech.errors import UserError
from hfspeech.models.whisper import load_for_inference

def sentence(ask):
    try:
        ask()
    except UserError as error:
        return str(error)

def split(name, **rest):
    return sentence(lambda: load_split(DataArguments(dataset_name=[name], on_bad_audio="skip", **rest), "test"))

def stream(name):
    rows = load_speech(DataArguments(dataset_name=[name], streaming=True, max_eval_samples=1))["train"]
    return next(row["fatal"] for row in rows if row["fatal"])

print(json.dumps({
    "script": split("acme/script"), "paths": split("acme/paths"), "paths, streamed": split("acme/paths", streaming=True),
    "trained on": sentence(lambda: stream("acme/paths")), "card": split("acme/card"), "table": split("acme/table"),
    "tar": split("acme/tar"),
    "pickle": sentence(lambda: load_for_inference("acme/pickle")),
    "pickled adapter": sentence(lambda: load_for_inference("acme/adapter")),
}))
"""


def test_repositories_of_others(tmp_path, marker, place):
    """Neither the code nor the pickles of a repository are run, nor do its rows or its card name what lies here."""
    private = tmp_path / "elsewhere/private.flac"
    repos = tmp_path / "repos"

    def write(path, content):
        (repos / path).parent.mkdir(parents=True, exist_ok=True)
        (repos / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    write("datasets/acme/script/script.py", f"open({str(marker)!r}, 'w')")
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        rows = [{"audio": {"bytes": flac(seed=10 * seed + i), "path": None}, "text": f"{i}"} for i in range(2)]
        if split != "validation":
            rows.append({"audio": {"bytes": None, "path": str(private)}, "text": "mine"})
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        write(f"datasets/acme/paths/data/{split}-00000-of-00001.parquet", file.getvalue())
    manifest(tmp_path / "elsewhere/rows.csv", ["private.flac"])
    write("datasets/acme/card/README.md", "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n"
          f"    path: {tmp_path / 'elsewhere/rows.csv'}\n---\n")  # fmt: skip
    write("datasets/acme/table/test.csv", f"audio,text\n{private},mine\n")
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("../../escaped.flac", flac()), ("../../escaped.txt", b"word")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write("datasets/acme/tar/test.tar", file.getvalue())
    shutil.copytree(
        NANO, repos / "models/acme/pickle", ignore=shutil.ignore_patterns("*.py", "*.yaml", "results*.json")
    )
    (repos / "models/acme/pickle/model.safetensors").unlink()
    torch.save({"x": Pickled(marker)}, repos / "models/acme/pickle/pytorch_model.bin")
    write("models/acme/adapter/adapter_config.json", json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": str(NANO), "revision": None, "target_modules": ["q_proj"]}))  # fmt: skip
    torch.save({"x": Pickled(marker)}, repos / "models/acme/adapter/adapter_model.bin")
    with LoopbackHub(repos) as hub:
        env = {**hub.env(tmp_path / "home", TOKEN), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        env["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # it is asked for on another server
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=env, cwd=tmp_path, text=True, capture_output=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "is not stored as parquet" in said["script"] or "no data files" in said["script"]
    for name in ("paths", "paths, streamed", "trained on"):
        assert f"Row 3 names the file {private} instead of holding audio" in said[name]
    assert "names data outside of that repository" in said["card"]
    assert "holds text and not audio" in said["table"]
    assert said["tar"] is None or "not stored as parquet" in said["tar"]
    assert "only in pytorch_model.bin, a pickle" in said["pickle"] and "hf download acme/pickle" in said["pickle"]
    assert "only in adapter_model.bin, a pickle" in said["pickled adapter"]
    assert sorted(tmp_path.rglob("escaped*")) == [] and TOKEN not in done.stdout + done.stderr
