"""Whisper and its adapters: loaded with every choice checked, and saved so that any stock tool loads them."""

import contextlib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from .errors import UserError, nearest
from .modeling import make_fast

ADAPTER_CONFIG = "adapter_config.json"
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
    quantization = _quantization_config(model_args)
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
            )
        model.generation_config = _generation_config(source, revision, config, processor)
        model.hub_commit = _hub_commit(source, revision)
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
        adapter = _read_adapter_config(source, revision)
        base = resolve(adapter["base_model_name_or_path"]) if adapter else source
        base_revision = (adapter["revision"] or "main") if adapter else revision
        with loading(base, base_revision):
            config = _whisper_config(base, base_revision)
            model = WhisperForConditionalGeneration.from_pretrained(
                base,
                config=config,
                revision=base_revision,
                dtype="auto" if best_device().type == "cuda" else torch.float32,  # CPUs are slow, and coarse, in fp16
            )
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, source, revision=revision).merge_and_unload()
        # An adapter saved by another tool may have neither tokenizer nor generation config: its base has.
        processor = _processor(source if _has(source, "tokenizer_config.json", revision) else base, revision)
        place = (source, revision) if _has(source, "generation_config.json", revision) else (base, base_revision)
        model.generation_config = _generation_config(*place, config, processor)
        model.hub_commit = _hub_commit(source, revision, ADAPTER_CONFIG if adapter else "config.json")
    make_fast(model)
    generation = model.generation_config
    if language or task:
        language = language or getattr(generation, "language", None)
        task = task or getattr(generation, "task", None) or "transcribe"
        set_language(model, processor, language, task, bool(getattr(generation, "return_timestamps", False)))
    return model.eval().to(best_device()), processor


def add_lora(model, lora_args):
    """Freezes a Whisper and puts a LoRA adapter on it.

    `all-linear` adapts every linear layer of encoder and decoder (peft itself passes over the output projection, and
    convolutions are not linear layers). If the encoder is frozen it gets no adapter.

    Args:
        model: `WhisperForConditionalGeneration`.
        lora_args: `LoraArguments`.

    Returns:
        `peft.PeftModel`; only the adapter's weights require a gradient.

    Raises:
        UserError: `lora_target_modules` names no layer of the model.
    """
    import peft

    targets = lora_args.lora_target_modules
    if {"conv1", "conv2"} & set(targets):  # Whisper's forward asks them for their stride, which peft's layer hides
        raise UserError(
            "--lora_target_modules: conv1 and conv2 cannot be adapted; leave them out, or take all-linear."
        )
    # No task_type: SEQ_2_SEQ_LM would pass input_ids, which Whisper's forward does not take.
    config = peft.LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=r".*model\.encoder\..*" if model.encoder_stays_frozen else None,
        use_dora=lora_args.use_dora,
    )
    if is_quantized(model):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        # The commit, so that whoever loads the adapter gets the very base that it was trained on.
        return peft.get_peft_model(model, config, revision=model.hub_commit)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UserError(
            f"--lora_target_modules {' '.join(targets)} names no layer of this model: "
            f"choose from {', '.join(sorted(linear))}, or all-linear."
        ) from None


def whisper_of(model):
    """Returns the `WhisperForConditionalGeneration` inside a model that peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_quantized(model):
    """Tells whether a model's weights are held in 8 or 4 bits."""
    return getattr(whisper_of(model), "quantization_method", None) is not None


def best_device():
    """Returns the `torch.device` to run inference on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def resolve(name_or_path):
    """Returns an absolute path for a local folder, and a Hub id as it is.

    peft writes the base model's name into the adapter as it was given, and a relative path would stick there.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return str(path.resolve())
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(
            f"There is no model at {name_or_path}: give a folder that exists (from here, {Path.cwd()}) or a Hub id "
            "such as openai/whisper-small."
        )
    return str(name_or_path)


@contextlib.contextmanager
def loading(source, revision="main"):
    """Turns every way in which loading a model fails into one sentence."""
    import safetensors
    from huggingface_hub import errors as hub

    transformers.utils.logging.disable_progress_bar()  # a bar for reading a local file; downloads have their own
    try:
        yield
    except UserError:
        raise
    except (safetensors.SafetensorError, EOFError, json.JSONDecodeError) as error:
        raise UserError(
            f"{source} is half-written or damaged ({_first_line(error)}): copy or download it again."
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, hub.HfHubHTTPError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"{source} does not fit on the GPU: choose a smaller Whisper, or LoRA with --load_in_8bit true."
            ) from None
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        names = {type(cause).__name__ for cause in causes}
        if "GatedRepoError" in names:
            problem = f"{source} is gated: accept its terms on its page, then `hf auth login`"
        elif "RevisionNotFoundError" in names:
            problem = f"{source} has no revision {revision}: check --model_revision"
        elif "RepositoryNotFoundError" in names:
            problem = f"The Hub has no model {source}, or it is private: check the name, or `hf auth login`"
        elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
            problem = f"Cannot reach the Hub for {source}, and no copy is in the cache: check the network"
        elif Path(source).exists():
            problem = (
                f"{source} is not a complete Whisper ({_first_line(error)}): give a folder that holds a whole model"
            )
        else:
            problem = f"Cannot load {source} ({_first_line(error)}): check the name and the access"
        raise UserError(problem + ".") from None


def _first_line(error):
    return str(error).strip().split("\n")[0].rstrip(".")[:160] or type(error).__name__


def _whisper_config(source, revision):
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise UserError(
            f"{source} holds no config.json, so it is not a model: give a folder that holds a whole model."
        )
    config = AutoConfig.from_pretrained(source, revision=revision)
    if config.model_type != "whisper":
        raise UserError(
            f"{source} is a {config.model_type} model, not a Whisper: give one such as openai/whisper-small."
        )
    return config


def _processor(source, revision):
    processor = WhisperProcessor.from_pretrained(source, revision=revision)
    if "<|startoftranscript|>" not in processor.tokenizer.get_vocab():  # stock loading makes up an empty tokenizer
        raise OSError("its tokenizer is missing")
    return processor


def _has(source, filename, revision):
    from transformers.utils import cached_file

    return cached_file(source, filename, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def _generation_config(source, revision, config, processor):
    """Returns a model's generation config; what an older one lacks is taken from the configuration and the tokenizer."""
    if _has(source, "generation_config.json", revision):  # stock loading makes one up if the file is damaged
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


def _hub_commit(source, revision, filename="config.json"):
    """Returns the commit that a revision stands for on the Hub, or None for a local folder."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(cached_file(source, filename, revision=revision), None)


def _read_adapter_config(source, revision):
    """Returns the adapter_config.json of a folder or Hub repository as a dict, or None if it holds a whole model."""
    from transformers.utils import cached_file

    found = cached_file(source, ADAPTER_CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text()) if found else None


def _quantization_config(model_args):
    if not (model_args.load_in_8bit or model_args.load_in_4bit):
        return None
    flag = "--load_in_8bit" if model_args.load_in_8bit else "--load_in_4bit"
    if not torch.cuda.is_available():
        raise UserError(f"{flag} needs a CUDA GPU, and this machine has none: leave it out.")
    if not transformers.utils.is_bitsandbytes_available():
        raise UserError(f"{flag} needs bitsandbytes: pip install bitsandbytes.")
    return transformers.BitsAndBytesConfig(
        load_in_8bit=model_args.load_in_8bit,
        load_in_4bit=model_args.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def quiet_transformers():
    """Leaves stderr to what the user has to know."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def enough_memory(advice="halve --batch_size"):
    """Turns a GPU that is too small into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"The GPU ran out of memory: {advice}.") from None
