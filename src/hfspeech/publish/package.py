"""The folder that may be published: complete, without anything private, and tried by loading it as others will."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hfspeech.errors import UserError
from hfspeech.models.loading import ADAPTER_CONFIG, base_of, identify, loading, read_adapter_config, resolve
from hfspeech.models.speecht5 import SPEAKERS_FILE, SYNTHESIS_FILE
from hfspeech.publish.card import CARD_FILE, write_card
from hfspeech.publish.privacy import VOCABULARY, Cleaner, forget_origin, public_record, require_private
from hfspeech.runs import RUN_FILE, SAMPLES_FOLDER, last_checkpoint, read_json, read_record, write_json, writing
from hfspeech.runs.checkpoints import MANIFEST_FILE, PART_FOLDER, PROGRESS_FILE, finish_checkpoint

CHECKPOINT_FOLDER = "last-checkpoint"
# Largest difference in a model's outputs, against the largest output: rounding alone, and that of merging.
SAME, MERGED = 1e-4, 1e-3

logger = logging.getLogger("hfspeech")


def package(run_dir, folder, merge=False, with_checkpoint=False, repo_id=None):
    """Writes into `folder` exactly what may be uploaded of a finished run, and tries it.

    That is: the adapter or the model in safetensors, tokenizer and feature extractor, the generation config, the voices
    and settings of a SpeechT5, what it said of the first test rows, the run's record without private paths, and the
    model card with the training curve. Left out are predictions and recordings, which are the dataset's, pickled files,
    logs and checkpoints.

    Args:
        run_dir: output folder of a run that has been published.
        folder: an empty folder.
        merge: put a LoRA adapter into the weights of its base, so that the model loads without peft.
        with_checkpoint: also the last whole checkpoint, to train on, with its pickled optimizer state.
        repo_id: `owner/name` of the repository, for the card.

    Raises:
        UserError: the run is not finished; its adapter is on a local model, which nobody else has, or which is to be
            merged and has changed since; what was written loads no more, or does not answer as the run's model does;
            something private would be published.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    record = finished_record(run_dir)
    adapter = read_adapter_config(str(run_dir), "main")
    base = adapter and adapter["base_model_name_or_path"]
    if adapter and not merge and Path(base).is_absolute():
        raise UserError(
            f"{run_dir} is an adapter on {base}, a folder of this machine without which nobody else can load it: give "
            "--merge, and the whole model is pushed."
        )
    is_merged = bool(adapter and merge)
    trained_on = record["model"].get("fingerprint")  # of a local base
    if is_merged and trained_on and (found := identify(base)["fingerprint"]) and found != trained_on:
        raise UserError(
            f"{base} has changed since {run_dir} was trained on it, so that merged they would be another model: put its "
            "weights of then back, and push again."
        )
    public = public_record(record)
    with loading(str(run_dir), kind="speech model"):
        model, processor = load_stock(run_dir)
        expected = answer(model, processor)
    with writing(folder, "free some space there, or choose another disk with TMPDIR, and push again"):
        if is_merged:
            model.merge_and_unload().save_pretrained(folder)
        else:
            for path in [
                *run_dir.glob("*model*.safetensors*"),
                run_dir / (ADAPTER_CONFIG if adapter else "config.json"),
            ]:
                shutil.copy(path, folder)
        del model
        processor.save_pretrained(folder)
        shutil.copy(run_dir / "generation_config.json", folder)
        _write_speech(run_dir, folder, Cleaner(record))
        if with_checkpoint:
            _write_checkpoint(run_dir, folder / CHECKPOINT_FOLDER, Cleaner(record))
        _forget_origins(folder)
        write_json(folder / RUN_FILE, public | {"weights": weights_digests(folder)})
    write_card(folder, public, repo_id, is_merged, with_checkpoint)
    require_same_answer(folder, expected, MERGED if is_merged else SAME)
    require_private(folder, _owners(public, repo_id))


def weights_digests(folder):
    """Returns file name → SHA-256 of the weights in a folder, by which a record says which weights it is about."""
    digests = {}
    for path in sorted(Path(folder).glob("*model*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def finished_record(run_dir):
    """Returns the record of a run, or says that there is none, that it is not finished, or that its weights are others."""
    if not (run_dir / RUN_FILE).exists():
        raise UserError(f"{run_dir} holds no {RUN_FILE}: give the output folder of a run.")
    record = read_record(run_dir / RUN_FILE)
    has_model = any((run_dir / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    if not has_model or not {"train", "after", "model"} <= record.keys():
        raise UserError(f"The run in {run_dir} is not finished: type its command again, then push.")
    measured = record.get("weights", {})  # records from before it was kept have none
    for name, digest in weights_digests(run_dir).items():
        if measured.get(name, digest) != digest:
            raise UserError(
                f"{run_dir / name} is no longer what the run measured, so the figures are not its own: type the run's "
                "command again, or copy the folder again from where it was made."
            )
    return record


def load_stock(folder):
    """Loads the model of a folder by stock code alone, as whoever finds it on the Hub does.

    On the CPU: at the end of a run the GPU is still full of what trained there.

    Args:
        folder: of a model or an adapter.

    Returns:
        (the model in fp32, an adapter still upon its base; its processor).

    Raises:
        OSError, ValueError: something is missing.
    """
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoProcessor,
        GenerationConfig,
        SpeechT5ForTextToSpeech,
        WhisperForConditionalGeneration,
    )

    adapter = read_adapter_config(str(folder), "main")
    source = resolve(adapter["base_model_name_or_path"]) if adapter else str(folder)
    revision = (adapter["revision"] or "main") if adapter else "main"
    classes = {"whisper": WhisperForConditionalGeneration, "speecht5": SpeechT5ForTextToSpeech}
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    kind = classes[config.model_type]
    model, found = kind.from_pretrained(
        source, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:  # stock loading fills them with noise
        raise OSError(f"its weights {sorted(found['missing_keys'])[0]} are missing")
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@torch.no_grad()
def answer(model, processor):
    """Returns what a model makes of an input that is always the same, as a tensor: logits, or a spectrogram."""
    with torch.random.fork_rng(devices=[]):  # SpeechT5 draws at random while it speaks
        torch.manual_seed(0)
        if base_of(model).config.model_type == "speecht5":
            ids = processor(text="a few words", return_tensors="pt").input_ids
            config = model.config
            frames = torch.randn(1, 20, config.num_mel_bins)
            voice = torch.randn(1, config.speaker_embedding_dim)
            return model(input_ids=ids, decoder_input_values=frames, speaker_embeddings=voice).spectrogram
        noise = torch.randn(processor.feature_extractor.sampling_rate).numpy()
        features = processor(noise, sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt")
        tokens = torch.tensor([processor.tokenizer("a few words").input_ids])
        return model(input_features=features.input_features, decoder_input_ids=tokens).logits


def require_same_answer(folder, expected, tolerance):
    """Loads a folder by stock code, and requires it to answer as the run's model does.

    Args:
        folder: to be published.
        expected: tensor, what `answer` returned of the run's model.
        tolerance: largest difference, as a share of the largest number expected.

    Raises:
        UserError: it cannot be loaded, or differs.
    """
    try:
        found = answer(*load_stock(folder))
    except UserError:
        raise
    except Exception as error:  # whatever stock code raises at a file that it cannot use
        raise UserError(
            f"Nothing is uploaded, for what would be cannot be loaded ({str(error).strip().splitlines()[0]}): see that "
            "the run's folder is whole and the disk not full."
        ) from None
    scale = expected.abs().max()
    difference = (found - expected).abs().max() / scale if found.shape == expected.shape else torch.inf
    if not difference <= tolerance:  # nor if it is not a number
        raise UserError(
            f"Nothing is uploaded, for what would be does not answer as the run's model does (they differ by "
            f"{difference:.1g}, {tolerance:.0g} is allowed): see that the run's folder is whole."
        )


def _write_speech(run_dir, folder, cleaner):
    """Copies what a SpeechT5 speaks with and has said; a vocoder or encoder that only this machine has is left out."""
    if not (run_dir / SYNTHESIS_FILE).exists():
        return
    settings = json.loads((run_dir / SYNTHESIS_FILE).read_text(encoding="utf-8"))
    write_json(folder / SYNTHESIS_FILE, {name: of for name, of in settings.items() if not str(of).startswith("/")})
    if (run_dir / SPEAKERS_FILE).exists():
        voices = load_file(run_dir / SPEAKERS_FILE)
        save_file({cleaner.text(name): voice for name, voice in voices.items()}, folder / SPEAKERS_FILE)
    (folder / SAMPLES_FOLDER).mkdir()
    for when in ("before", "after"):
        for path in (run_dir / SAMPLES_FOLDER).glob(f"*_{when}.*"):
            shutil.copy(path, folder / SAMPLES_FOLDER)


def _write_checkpoint(run_dir, folder, cleaner):
    checkpoint = last_checkpoint(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} holds no whole checkpoint: leave the checkpoint out.")
    part = folder.with_name(PART_FOLDER)
    shutil.copytree(checkpoint, part, ignore=shutil.ignore_patterns("training_args.bin", CARD_FILE, MANIFEST_FILE))
    quoting = {PROGRESS_FILE: {"bad_audio": {}, "left_out": {}}}  # they name rows, and quote them
    for path in (part / "trainer_state.json", part / PROGRESS_FILE, part / ADAPTER_CONFIG):
        if path.exists():
            write_json(path, cleaner.value(read_json(path) | quoting.get(path.name, {})))
    _forget_origins(part)
    finish_checkpoint(part, folder)  # with a new list of what belongs to it


def _forget_origins(folder):
    for path in folder.glob("*.json"):
        if path.name not in VOCABULARY:
            forget_origin(path)


def _owners(record, repo_id):
    """Returns the names before the slash of the ids that the card names."""
    ids = [
        repo_id or "",
        record["model"]["name_or_path"] or "",
        *(of["name"] for of in record["rows"]["account"]["datasets"]),
    ]
    return {name.partition("/")[0] for name in ids}
