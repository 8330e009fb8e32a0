"""Whisper: loaded to be fine-tuned, or to transcribe."""

import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from hfspeech.errors import UserError, nearest
from hfspeech.modeling.whisper import make_fast
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

MULTILINGUAL_VOCABULARY = 51865  # the English-only checkpoints have 51,864 tokens


def load_whisper(model_args):
    """Loads the Whisper to fine-tune and its processor, set to one language and task.

    The language, task and timestamps go into the generation config and the tokenizer's prefix, nowhere else, so that
    what is trained is what `generate` later does without being told.

    Args:
        model_args: `WhisperArguments`. `config_name` instead of `model_name_or_path` starts from random weights.

    Returns:
        (`WhisperForConditionalGeneration` in fp32 or quantised, `WhisperProcessor`).

    Raises:
        UserError: no such model, no access, not a Whisper, half-written weights, an unknown language, quantisation
            without CUDA or bitsandbytes.
    """
    source = resolve(model_args.model_name_or_path or model_args.config_name)
    revision = model_args.model_revision
    quantization = quantization_config(model_args)
    with loading(source, revision):
        config = _whisper_config(source, revision)
        config.apply_spec_augment = model_args.apply_spec_augment
        for name in ("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length"):
            setattr(config, name, getattr(model_args, name))
        if model_args.dropout is not None:
            config.dropout = model_args.dropout
        processor = _processor(source, revision)
        if model_args.config_name:
            config._attn_implementation = model_args.attn_implementation
            model = WhisperForConditionalGeneration(config)
        else:
            model = WhisperForConditionalGeneration.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=torch.float32,
                attn_implementation=model_args.attn_implementation,
                quantization_config=quantization,
                use_safetensors=True,
            )
        model.generation_config = _generation_config(source, revision, config, processor)
        model.hub_commit = hub_commit(source, revision)
        model.license = license_of(source, revision)
    make_fast(model)
    model.encoder_stays_frozen = model_args.freeze_encoder
    set_language(model, processor, model_args.language, model_args.task, model_args.timestamps)
    if model_args.freeze_encoder:
        model.freeze_encoder()
    return model, processor


def load_for_inference(name_or_path, revision="main", language=None, task=None):
    """Loads any Whisper, base or adapter, from a folder or the Hub, ready to transcribe.

    Args:
        name_or_path: Hub id or folder of a Whisper, or of a LoRA adapter of one.
        revision: branch, tag or commit on the Hub.
        language, task: override what the model's own generation config says.

    Returns:
        (`WhisperForConditionalGeneration` with any adapter merged, in eval mode on the best device, `WhisperProcessor`).
    """
    source = resolve(name_or_path)
    with loading(source, revision):
        adapter = read_adapter_config(source, revision)
        base = resolve(adapter["base_model_name_or_path"]) if adapter else source
        base_revision = (adapter["revision"] or "main") if adapter else revision
        with loading(base, base_revision):
            config = _whisper_config(base, base_revision)
            model = WhisperForConditionalGeneration.from_pretrained(
                base,
                config=config,
                revision=base_revision,
                dtype="auto" if best_device().type == "cuda" else torch.float32,  # CPUs are slow, and coarse, in fp16
                use_safetensors=True,
            )
        if adapter:
            model = merge_adapter(model, source, revision)
        # An adapter saved by another tool may have neither tokenizer nor generation config: its base has.
        processor = _processor(source if has_file(source, "tokenizer_config.json", revision) else base, revision)
        place = (source, revision) if has_file(source, "generation_config.json", revision) else (base, base_revision)
        model.generation_config = _generation_config(*place, config, processor)
        model.hub_commit = hub_commit(source, revision, ADAPTER_CONFIG if adapter else "config.json")
    make_fast(model)
    generation = model.generation_config
    if language or task:
        language = language or getattr(generation, "language", None)
        task = task or getattr(generation, "task", None) or "transcribe"
        set_language(model, processor, language, task, bool(getattr(generation, "return_timestamps", False)))
    return model.eval().to(best_device()), processor


def language_code(language):
    """Returns Whisper's code for a language given as a name or a code, in any case: `German` and `de` give `de`.

    Raises:
        UserError: a language that Whisper does not know; the nearest name is suggested.
    """
    language = language.lower()
    code = TO_LANGUAGE_CODE.get(language, language)
    if code not in LANGUAGES:
        raise UserError(
            f"--language {language}: Whisper knows no such language.{nearest(language, [*TO_LANGUAGE_CODE, *LANGUAGES])} "
            "For a language that it was not trained on, name the closest one that it was."
        )
    return code


def set_language(model, processor, language, task, timestamps):
    """Sets what a Whisper writes: in its generation config and in the prefix of its labels."""
    generation = model.generation_config
    generation.forced_decoder_ids = None
    if not getattr(generation, "is_multilingual", True):
        if language and language_code(language) != "en":
            raise UserError(
                f"--language {language}: this model is English only; leave --language out or pick another."
            )
        if task == "translate":
            raise UserError("--task translate: this model is English only; start from a multilingual Whisper.")
        # An English-only Whisper has neither a language nor a task token, and generate refuses both settings.
        generation.return_timestamps = timestamps
        processor.tokenizer.set_prefix_tokens(predict_timestamps=timestamps)
        return
    if not language:
        raise UserError(
            "This Whisper is multilingual: say which language is spoken with --language, for example --language german."
        )
    code = language_code(language)
    known = getattr(generation, "lang_to_id", None) or {}
    if f"<|{code}|>" not in known:
        raise UserError(
            f"--language {language}: this model has no token for it, only for "
            f"{', '.join(token.strip('<|>') for token in list(known)[:12])}{', ...' if len(known) > 12 else ''}."
        )
    generation.language, generation.task, generation.return_timestamps = code, task, timestamps
    processor.tokenizer.set_prefix_tokens(language=code, task=task, predict_timestamps=timestamps)


def _whisper_config(source, revision):
    return read_config(source, revision, "whisper", "Whisper", "openai/whisper-small")


def _processor(source, revision):
    processor = WhisperProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    if "<|startoftranscript|>" not in processor.tokenizer.get_vocab():  # stock loading makes up an empty tokenizer
        raise OSError("its tokenizer is missing")
    return processor


def _generation_config(source, revision, config, processor):
    """Returns a model's generation config; what an older one lacks is taken from the configuration and the tokenizer."""
    if has_file(source, "generation_config.json", revision):  # stock loading makes one up if the file is damaged
        generation = GenerationConfig.from_pretrained(source, revision=revision)
    else:
        generation = GenerationConfig(max_length=config.max_target_positions)
    ids = processor.tokenizer.get_vocab()
    found = {
        "is_multilingual": config.vocab_size >= MULTILINGUAL_VOCABULARY,
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in ids},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate") if f"<|{task}|>" in ids},
        "no_timestamps_token_id": ids.get("<|notimestamps|>"),
        "prev_sot_token_id": ids.get("<|startofprev|>"),
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "return_timestamps": False,
    }
    for name, value in found.items():
        if getattr(generation, name, None) is None:
            setattr(generation, name, value)
    return generation
