"""SpeechT5: loaded to be fine-tuned, or to speak."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import SpeechT5ForTextToSpeech, SpeechT5Processor

from hfspeech.errors import UserError
from hfspeech.modeling.speecht5 import make_trainable
from hfspeech.models.loading import (
    ADAPTER_CONFIG,
    best_device,
    has_file,
    hub_commit,
    license_of,
    loading,
    merge_adapter,
    quantization_config,
    read_adapter_config,
    read_config,
    resolve,
)
from hfspeech.spelling import TextFrontEnd, add_characters

SPEAKERS_FILE = "speaker_embeddings.safetensors"
SYNTHESIS_FILE = "synthesis.json"


def load_speecht5(model_args):
    """Loads the SpeechT5 to fine-tune, its processor, and what turns text into its tokens.

    Args:
        model_args: `SpeechT5Arguments`. `config_name` instead of `model_name_or_path` starts from random weights.

    Returns:
        (`SpeechT5ForTextToSpeech` in fp32 or quantised, `SpeechT5Processor`, `TextFrontEnd`).

    Raises:
        UserError: no such model, no access, not a SpeechT5, half-written weights, quantisation without CUDA.
    """
    source = resolve(model_args.model_name_or_path or model_args.config_name)
    revision = model_args.model_revision
    quantization = quantization_config(model_args)
    with loading(source, revision, "SpeechT5"):
        config = _speecht5_config(source, revision)
        config.use_guided_attention_loss = model_args.use_guided_attention_loss
        # A layer that is dropped leaves the attention loss without it, and several processes without its gradient.
        config.encoder_layerdrop = config.decoder_layerdrop = 0.0
        processor = SpeechT5Processor.from_pretrained(source, revision=revision, trust_remote_code=False)
        if model_args.config_name:
            model = SpeechT5ForTextToSpeech(config)
        else:
            model = SpeechT5ForTextToSpeech.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=torch.float32,
                quantization_config=quantization,
                use_safetensors=True,
            )
        model.hub_commit = hub_commit(source, revision)
        model.license = license_of(source, revision)
    model.has_new_characters = bool(model_args.add_characters)
    if model.has_new_characters:
        add_characters(model, processor, model_args.add_characters)
    model.encoder_stays_frozen = False
    front_end = TextFrontEnd(processor.tokenizer, model_args.language, model_args.spell_out)
    return make_trainable(model), processor, front_end


def load_speecht5_for_inference(name_or_path, revision="main"):
    """Loads any SpeechT5, base or adapter, from a folder or the Hub, ready to speak.

    Args:
        name_or_path: Hub id or folder of a `SpeechT5ForTextToSpeech`, or of a LoRA adapter of one.
        revision: branch, tag or commit on the Hub.

    Returns:
        (`SpeechT5ForTextToSpeech` with any adapter merged, in eval mode on the best device, `SpeechT5Processor`, what
        `save_synthesis` wrote beside it, and a dict of speaker name to embedding; both empty for a stock model).
    """
    source = resolve(name_or_path)
    with loading(source, revision, "SpeechT5"):
        adapter = read_adapter_config(source, revision)
        base = resolve(adapter["base_model_name_or_path"]) if adapter else source
        base_revision = (adapter["revision"] or "main") if adapter else revision
        with loading(base, base_revision, "SpeechT5"):
            model = SpeechT5ForTextToSpeech.from_pretrained(
                base,
                config=_speecht5_config(base, base_revision),
                revision=base_revision,
                dtype=torch.float32,
                use_safetensors=True,
            )
        if adapter:
            model = merge_adapter(model, source, revision)
        # An adapter saved by another tool may have no tokenizer: its base has.
        has_processor = has_file(source, "tokenizer_config.json", revision)
        place, at = (source, revision) if has_processor else (base, base_revision)
        processor = SpeechT5Processor.from_pretrained(place, revision=at, trust_remote_code=False)
        model.hub_commit = hub_commit(source, revision, ADAPTER_CONFIG if adapter else "config.json")
        settings = _cached(source, SYNTHESIS_FILE, revision)
        settings = json.loads(Path(settings).read_text(encoding="utf-8")) if settings else {}
        speakers = _cached(source, SPEAKERS_FILE, revision)
        speakers = load_file(speakers) if speakers else {}
    return model.eval().to(best_device()), processor, settings, speakers


def save_synthesis(folder, settings, speakers):
    """Writes beside a model what it takes to speak with it: vocoder, speaker encoder, language, and its voices.

    Args:
        folder: the model's folder.
        settings: dict of the run's settings.
        speakers: dict of speaker name to embedding, float tensors of shape (512,).
    """
    names = ("language", "spell_out", "vocoder", "speaker_encoder")
    settings = {name: settings[name] for name in names}
    for name in ("vocoder", "speaker_encoder"):  # a relative path leads nowhere from another folder
        if Path(settings[name]).expanduser().exists():
            settings[name] = resolve(settings[name])
    (Path(folder) / SYNTHESIS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if speakers:
        save_file({name: vector.contiguous() for name, vector in speakers.items()}, Path(folder) / SPEAKERS_FILE)


def _cached(source, filename, revision):
    from transformers.utils import cached_file

    return cached_file(source, filename, revision=revision, _raise_exceptions_for_missing_entries=False)


def _speecht5_config(source, revision):
    config = read_config(source, revision, "speecht5", "SpeechT5", "microsoft/speecht5_tts")
    kinds = config.architectures or ["SpeechT5ForTextToSpeech"]
    if "SpeechT5ForTextToSpeech" not in kinds:
        raise UserError(
            f"{source} is a {kinds[0]}, which does not speak text: give microsoft/speecht5_tts, or a child of it."
        )
    return config
