"""What is published: whole, loadable by stock tools, the same model, and nothing that is nobody else's business."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import NANO, NANO_SPEECHT5, NEW_DIGITS, ROOT, launch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    SpeechT5Processor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    pipeline,
)

from hfspeech.audio import decode
from hfspeech.errors import UserError
from hfspeech.models.loading import identify
from hfspeech.publish.package import answer, load_stock, package, require_same_answer
from hfspeech.publish.privacy import Cleaner, require_private
from hfspeech.runs import is_whole_checkpoint
from hfspeech.runs.checkpoints import MANIFEST_FILE, PART_FOLDER, finish_checkpoint

PLANTED_TOKEN = "hf_" + "Planted" * 5
SHORT = ["--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1, "--warmup_steps", 0]
SHORT += ["--per_device_train_batch_size", 4, "--report_to", "none"]


def put_in_cache(home, repo_id, folder, commit="0123456789abcdef0123456789abcdef01234567"):
    """Lays a folder into the Hub's cache below `home`, as a download of that repository would, and returns `home`."""
    repo = Path(home) / "hub" / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    if not (Path(folder) / "config.json").exists():  # of an adapter; the cache remembers what was asked for in vain
        (repo / ".no_exist" / commit).mkdir(parents=True)
        (repo / ".no_exist" / commit / "config.json").touch()
    return Path(home)


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory):
    """A Hub cache that holds the nano Whisper as acme/nano-whisper, for in-process and launched programs."""
    return put_in_cache(tmp_path_factory.mktemp("hub"), "acme/nano-whisper", NANO)


@pytest.fixture(autouse=True)
def hub_cache(hub_home, monkeypatch):
    """The same cache for this process; returns its `home`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_home / "hub"))
    return hub_home


@pytest.fixture(scope="module")
def whisper_run(few_digits, hub_home, tmp_path_factory):
    """The output folder of a short LoRA run on a base from the Hub, with a token in its environment."""
    folder = tmp_path_factory.mktemp("whisper") / "my-whisper"
    flags = ["--model_name_or_path", "acme/nano-whisper", "--group_columns", "speaker", "--encoder_window", "auto"]
    flags += ["--max_test_samples", 20, *SHORT]
    env = {"HF_HOME": str(hub_home), "HF_TOKEN": PLANTED_TOKEN}
    launch("whisper_lora", *flags, data=few_digits, output_dir=folder, launcher="python", env=env)
    return folder


@pytest.fixture(scope="module")
def speecht5_run(short_voice, tmp_path_factory):
    """The output folder of a short full run on a SpeechT5 given by its absolute path."""
    folder = tmp_path_factory.mktemp("speecht5") / "my-voice"
    flags = ["--model_name_or_path", NANO_SPEECHT5, "--asr_model_name_or_path", NANO, *SHORT]
    launch("speecht5_full", *flags, data=short_voice, output_dir=folder, launcher="python")
    return folder


def packed(run_dir, folder, **options):
    folder.mkdir()
    package(run_dir, folder, **options)
    return folder


def changed(run_dir, target):
    """Copies a run without its checkpoints, to be damaged."""
    return shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns("checkpoint-*"))


def with_record(run_dir, **entries):
    """Changes entries of a run's record."""
    file = run_dir / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WHISPER = {"generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
WHISPER |= {"README.md", "run.json", "training_curve.png"}


def test_an_adapter_is_whole_and_private(whisper_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED_TOKEN)
    folder = packed(whisper_run, tmp_path / "packed", repo_id="me/my-whisper")
    assert files(folder) == WHISPER | {"adapter_config.json", "adapter_model.safetensors"}
    nobody_elses(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/nano-whisper" and config["revision"]
    record, original = (json.loads((place / "run.json").read_text()) for place in (folder, whisper_run))
    assert record["arguments"]["dataset_name"] == ["digits"] and record["arguments"]["output_dir"] == "my-whisper"
    assert record["environment"]["command"].startswith(
        "python recipes/whisper_lora/run.py recipes/whisper_lora/demo.yaml"
    )
    for name in ("before", "after", "train", "retention", "weights"):
        assert record[name] == original[name]

    base = WhisperForConditionalGeneration.from_pretrained("acme/nano-whisper", revision=config["revision"])
    base.generation_config = GenerationConfig.from_pretrained(folder)
    model, processor = PeftModel.from_pretrained(base, folder).eval(), WhisperProcessor.from_pretrained(folder)
    row = json.loads((whisper_run / "predictions.jsonl").read_text().splitlines()[0])
    waveform = decode(NEW_DIGITS / "test" / row["id"])
    features = processor(waveform, sampling_rate=16000, return_tensors="pt").input_features
    heard = processor.batch_decode(model.generate(input_features=features), skip_special_tokens=True)[0]
    assert heard.strip() == row["after"]


def nobody_elses(folder):
    """No file holds a token, a path of this machine, or a row of the data; none is pickled."""
    for name in files(folder):
        content = (folder / name).read_bytes()
        for secret in (PLANTED_TOKEN, str(ROOT), "/tmp/", "pytest-", str(NANO.parent), "/home/", "/root/"):
            assert secret.encode() not in content, (name, secret)
        assert not re.search(r"\.(bin|pt|pth|pkl|jsonl)$", name) or name.startswith("last-checkpoint/")
    assert not [name for name in files(folder) if "training_args" in name or "recording" in name]


def test_merged_is_the_adapter_on_its_base(whisper_run, tmp_path):
    folder = packed(whisper_run, tmp_path / "packed", merge=True, repo_id="me/my-whisper")
    assert files(folder) == WHISPER | {"config.json", "model.safetensors"}
    nobody_elses(folder)
    model, _ = load_stock(folder)
    assert not isinstance(model, PeftModel)
    torch.testing.assert_close(answer(*load_stock(folder)), answer(*load_stock(whisper_run)), rtol=1e-3, atol=1e-3)
    recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    row = json.loads((whisper_run / "predictions.jsonl").read_text().splitlines()[0])
    waveform = decode(NEW_DIGITS / "test" / row["id"])
    heard = recognise({"raw": waveform, "sampling_rate": 16000}, generate_kwargs={"num_beams": 1})
    assert heard["text"].strip() == row["after"]


def test_an_adapter_on_a_local_base_can_be_published_merged_only(whisper_run, tmp_path):
    run_dir = changed(whisper_run, tmp_path / "run")
    config = json.loads((run_dir / "adapter_config.json").read_text())
    base = shutil.copytree(NANO, tmp_path / "base")
    config |= {"base_model_name_or_path": str(base), "revision": None}
    (run_dir / "adapter_config.json").write_text(json.dumps(config))
    with_record(run_dir, model=identify(str(base)))
    with pytest.raises(
        UserError, match="a folder of this machine without which nobody else can load it: give --merge"
    ):
        packed(run_dir, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == set()
    part = shutil.copytree(whisper_run / "checkpoint-4", run_dir / PART_FOLDER)
    (part / MANIFEST_FILE).unlink()
    progress = json.loads((part / "progress.json").read_text())
    quotes = {"bad_audio": {"train": {"row 3, anna.wav: 0 samples": True}}, "left_out": {"empty": {"3": "anna.wav"}}}
    (part / "progress.json").write_text(json.dumps(progress | quotes))
    shutil.copy(run_dir / "adapter_config.json", part)
    finish_checkpoint(part, run_dir / "checkpoint-4")
    folder = packed(run_dir, tmp_path / "merged", merge=True, with_checkpoint=True)
    nobody_elses(folder)
    published = json.loads((folder / "last-checkpoint/progress.json").read_text())
    assert published == progress | {"bad_audio": {}, "left_out": {}}
    assert is_whole_checkpoint(folder / "last-checkpoint")
    shifted(base / "model.safetensors")
    with pytest.raises(UserError, match=f"{base} has changed since .* was trained on it"):
        packed(run_dir, tmp_path / "other", merge=True)


def test_a_speecht5_speaks_by_stock_code(speecht5_run, tmp_path):
    run_dir = changed(speecht5_run, tmp_path / "run")
    settings = json.loads((run_dir / "synthesis.json").read_text())
    (run_dir / "synthesis.json").write_text(json.dumps(settings | {"vocoder": str(tmp_path)}))  # of this machine alone
    folder = packed(run_dir, tmp_path / "packed", repo_id="me/my-voice")
    samples = {f"samples/{number}_{when}.wav" for number in range(4) for when in ("before", "after")}
    assert files(folder) == samples | {
        "samples/0_before.png", "samples/0_after.png", "speaker_embeddings.safetensors", "synthesis.json", "README.md",
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "run.json", "spm_char.model",
        "tokenizer_config.json", "training_curve.png",
    }  # fmt: skip
    nobody_elses(folder)
    assert "vocoder" not in json.loads((folder / "synthesis.json").read_text())
    for mine, published in zip(*(load_file(place / "model.safetensors").items() for place in (speecht5_run, folder))):
        assert mine[0] == published[0] and torch.equal(mine[1], published[1])

    model, processor = SpeechT5ForTextToSpeech.from_pretrained(folder), SpeechT5Processor.from_pretrained(folder)
    voice = load_file(folder / "speaker_embeddings.safetensors")["slt"][None]
    ids = processor(text="four two nine", return_tensors="pt").input_ids
    assert model.generate_speech(ids, voice).shape[1] == 80
    say = pipeline("text-to-speech", model=str(folder), vocoder=SpeechT5HifiGan(TINY_VOCODER), device="cpu")
    assert np.asarray(say("four two nine", forward_params={"speaker_embeddings": voice})["audio"]).size > 0


TINY_VOCODER = SpeechT5HifiGanConfig(
    upsample_initial_channel=16, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]]
)


def test_the_last_checkpoint_goes_along_when_asked_for(speecht5_run, tmp_path):
    folder = packed(speecht5_run, tmp_path / "packed", with_checkpoint=True)
    assert is_whole_checkpoint(folder / "last-checkpoint")
    state = json.loads((folder / "last-checkpoint/trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["best_model_checkpoint"].startswith("my-voice/checkpoint-")
    nobody_elses(folder)
    assert "`last-checkpoint/` is there to train on" in (folder / "README.md").read_text()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        packed(changed(speecht5_run, tmp_path / "run"), folder, with_checkpoint=True)


def shifted(path):
    """Changes one tensor of a safetensors file."""
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {name: tensors[name] + 0.1}, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [shifted, cut, without_a_tensor])
def test_damaged_weights_are_not_published(damage, speecht5_run, tmp_path):
    """Neither what is damaged in the run's folder, nor what is damaged on the way from there."""
    run_dir = changed(speecht5_run, tmp_path / "run")
    damage(run_dir / "model.safetensors")
    with pytest.raises(UserError, match="is no longer what the run measured"):
        packed(run_dir, tmp_path / "packed")
    damage(shutil.copytree(speecht5_run, tmp_path / "copy") / "model.safetensors")
    with pytest.raises(UserError, match="Nothing is uploaded, for what would be (does not answer|cannot be loaded)"):
        require_same_answer(tmp_path / "copy", answer(*load_stock(speecht5_run)), 1e-5)


def test_a_folder_without_its_tokenizer_is_not_published(whisper_run, tmp_path):
    run_dir = changed(whisper_run, tmp_path / "run")
    expected = answer(*load_stock(run_dir))
    (run_dir / "processor_config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        require_same_answer(run_dir, expected, 1e-5)


def test_only_a_finished_run_is_published(whisper_run, tmp_path):
    with pytest.raises(UserError, match="holds no run.json"):
        package(tmp_path, tmp_path / "packed")
    run_dir = changed(whisper_run, tmp_path / "run")
    record = json.loads((run_dir / "run.json").read_text())
    del record["after"]
    (run_dir / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not finished: type its command again"):
        package(run_dir, tmp_path / "packed")
    (run_dir / "run.json").write_text("[]")
    with pytest.raises(UserError, match="run.json is not the record of a run"):
        package(run_dir, tmp_path / "packed")


@pytest.mark.parametrize("text, cleaned", [
    ("carved from /data/jo/corpus: 6 rows", "carved from corpus: 6 rows"),
    (f"python recipes/x/run.py {ROOT}/recipes/x/args.yaml --output_dir=~/runs/a",
     "python recipes/x/run.py recipes/x/args.yaml --output_dir=a"),
    ("--dataset_name '/data/My Speech/corpus'", "--dataset_name 'corpus'"),
    ("../other/a.csv and ./b/c.csv", "a.csv and b/c.csv"),
    ("and/or 3/4 km/h https://huggingface.co/a/b <|/x|> </s> acme/digits", None),
])  # fmt: skip
def test_paths_become_names(text, cleaned, monkeypatch):
    monkeypatch.chdir(ROOT)
    cleaner = Cleaner({"arguments": {"dataset_name": ["/data/My Speech/corpus", "/", "acme/digits"], "seed": 1}})
    assert cleaner.text(text) == (cleaned or text)
    assert cleaner.value({text: [text, 1, None]}) == {cleaned or text: [cleaned or text, 1, None]}


@pytest.mark.parametrize("planted, what", [
    ("x hf_abcdefghijklmnopqrstuvwxyz", "a token of the Hub"),
    ("key s3cr3t-value here", "the secret of WANDB_API_KEY"),
    ("/srv/people/jdoe42/data", "your home folder"),
    ("/mnt/jdoe42/data", "your user name"),
    ("made by jdoe42@example.org", "your user name"),
    ("on gpu-box-7 it was made", "the name of this machine"),
    (f"{ROOT}/src", "the path of the checkout"),
])  # fmt: skip
def test_every_byte_is_looked_at(planted, what, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value")
    monkeypatch.setenv("HOME", "/srv/people/jdoe42")
    monkeypatch.setattr("getpass.getuser", lambda: "jdoe42")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box-7")
    (tmp_path / "deep").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "deep/curve.png").write_bytes(b"\x00\xff by jdoe42, jdoe423/x, gpu-box-70, hf_short")
    require_private(tmp_path)
    (tmp_path / "deep/curve.png").write_bytes(b"\x00\xff\x01" * 99 + planted.encode() + b"\x00\xff")
    with pytest.raises(UserError, match=f"Nothing is uploaded, for deep/curve.png holds {what}: ") as caught:
        require_private(tmp_path)
    assert "s3cr3t" not in str(caught.value) and "hf_abc" not in str(caught.value)
    if what == "your user name":
        require_private(tmp_path, public_names=["jdoe42"])  # whoever publishes as jdoe42 has no secret in it


def test_what_stands_there_by_chance_is_no_secret(tmp_path, monkeypatch):
    """A word of the vocabulary, and four letters somewhere in gigabytes of weights."""
    monkeypatch.setenv("POSTGRES_PASSWORD", "password")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu1")
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    monkeypatch.setenv("HOME", "/srv/people/anna")
    (tmp_path / "tokenizer.json").write_text('{"Ġpassword": 1}')
    for name in ("model.safetensors", "optimizer.pt", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"\x00\xff gpu1 \x00/anna/\xff")
    require_private(tmp_path)
    for text, what in (("password", "the secret of POSTGRES_PASSWORD"), ("gpu1", "the name of this machine")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=f"run.json holds {what}"):
            require_private(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"/srv/people/anna/models")  # a whole path is no chance
    with pytest.raises(UserError, match="model.safetensors holds your home folder"):
        require_private(tmp_path)


def test_the_code_of_the_card_runs_as_it_stands(whisper_run, speecht5_run, hub_cache, tmp_path, monkeypatch, capsys):
    """With each package in the Hub's cache, where a download would have put it."""
    row = json.loads((whisper_run / "predictions.jsonl").read_text().splitlines()[0])
    monkeypatch.chdir(tmp_path)
    soundfile.write("recording.wav", decode(NEW_DIGITS / "test" / row["id"]), 16000)
    for name, run_dir, merge in (
        ("whisper", whisper_run, True),
        ("adapter", whisper_run, False),
        ("voice", speecht5_run, False),
    ):
        folder = packed(run_dir, tmp_path / name, merge=merge, repo_id=f"me/{name}")
        put_in_cache(hub_cache, f"me/{name}", folder)
    SpeechT5HifiGan(TINY_VOCODER).save_pretrained(tmp_path / "vocoder")
    put_in_cache(hub_cache, "microsoft/speecht5_hifigan", tmp_path / "vocoder")
    for name in ("whisper", "adapter", "voice"):
        capsys.readouterr()
        code = re.search(r"```python\n(.*?)```", (tmp_path / name / "README.md").read_text(), re.S)[1]
        exec(code, {})
        if name == "voice":
            assert soundfile.info("good_morning.wav").samplerate == 16000
        else:
            assert capsys.readouterr().out.strip() == row["after"]


def test_a_run_leaves_its_card_behind(whisper_run, speecht5_run):
    for folder in (whisper_run, speecht5_run):
        card = (folder / "README.md").read_text()
        data = ModelCard(card).data
        assert data.model_name == folder.name and data.license == "apache-2.0"  # as the base's card says
        assert str(folder.parent) not in card and str(ROOT) not in card
        picture = Image.open(folder / "training_curve.png")
        assert picture.size[0] > 600 and len(picture.convert("L").getcolors(256)) > 10  # lines, not a blank sheet
    card = (whisper_run / "README.md").read_text()
    head = ModelCard(card).data.to_dict()
    assert head["base_model"] == "acme/nano-whisper" and head["base_model_relation"] == "adapter"
    assert "unpadded, as `hfspeech transcribe` does it" in card and "of 3 speakers" in card
    assert "It hears 5 s at a time" in card
    heard = (speecht5_run / "README.md").read_text()
    assert '<audio controls src="samples/3_after.wav">' in heard and "(samples/0_before.png)" in heard
