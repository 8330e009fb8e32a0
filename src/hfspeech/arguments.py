"""The dataclasses that hold every setting, and the parser that lays flags over an arguments file."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from .errors import UserError, nearest

logger = logging.getLogger("hfspeech")


@dataclass
class DataArguments:
    """Where the rows come from, and which of them are used."""

    dataset_name: list[str] = field(
        default=None,
        metadata={
            "help": "Hub dataset id, audiofolder, CSV/TSV/JSONL manifest or parquet file; several of them are mixed."
        },
    )
    dataset_config_name: list[str] = field(
        default=None, metadata={"help": "Configuration of the Hub dataset: one for all, or one for each of several."}
    )
    dataset_revision: list[str] = field(
        default=None, metadata={"help": "Branch, tag or commit of the Hub dataset: one for all, or one for each."}
    )
    dataset_weights: list[float] = field(
        default=None, metadata={"help": "How often training draws from each of several datasets. Default: by size."}
    )
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str = field(
        default="validation", metadata={"help": "Split to choose the best checkpoint on; carved from train if absent."}
    )
    test_split_name: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Split or splits that the result is measured on."}
    )
    validation_share: float = field(
        default=0.05, metadata={"help": "Share of the training rows (whole speakers) carved out for validation."}
    )
    audio_root: list[str] = field(
        default=None,
        metadata={"help": "Folders that the paths of a manifest may lead into, besides the manifest's own."},
    )
    audio_column_name: str = field(default=None, metadata={"help": "Column of the audio. Default: found by itself."})
    text_column_name: str = field(default=None, metadata={"help": "Column of the text. Default: found by itself."})
    id_column_name: str = field(default=None, metadata={"help": "Column that identifies a recording."})
    speaker_column_name: str = field(
        default=None, metadata={"help": "Column of the speaker, for intervals and for carving validation."}
    )
    speakers: list[str] = field(
        default=None, metadata={"help": "Use the rows of these speakers only, such as the one voice to learn."}
    )
    speaker_embedding_column_name: str = field(
        default=None, metadata={"help": "Column that holds each row's speaker embedding already (SpeechT5)."}
    )
    group_columns: list[str] = field(
        default=None, metadata={"help": "Columns whose values get an error rate each, such as accent or speaker."}
    )
    retention_dataset_name: str = field(
        default=None, metadata={"help": "Data of the old condition: what the model must not forget."}
    )
    retention_dataset_config_name: str = field(
        default=None, metadata={"help": "Configuration of the retention dataset on the Hub."}
    )
    retention_dataset_revision: str = field(
        default=None, metadata={"help": "Branch, tag or commit of the retention dataset on the Hub."}
    )
    retention_train_split_name: str = field(
        default="train", metadata={"help": "Split of the retention dataset that is played on."}
    )
    retention_test_split_name: str = field(
        default="test", metadata={"help": "Split of the retention dataset that is measured."}
    )
    retention_share: float = field(
        default=0.0, metadata={"help": "Share of the training rows drawn from the old condition's train split."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows as they come instead of downloading first."})
    min_duration_in_seconds: float = field(default=0.1, metadata={"help": "Shorter recordings are left out."})
    max_duration_in_seconds: float = field(
        default=None,
        metadata={"help": "Longer recordings are left out. Default: Whisper's window (30 s), 20 s for SpeechT5."},
    )
    max_train_samples: int = field(default=None, metadata={"help": "Use only the first rows of train."})
    max_eval_samples: int = field(default=None, metadata={"help": "Use only the first rows of validation."})
    max_test_samples: int = field(default=None, metadata={"help": "Use only the first rows of each test split."})
    on_bad_audio: str = field(
        default="error",
        metadata={
            "help": "What a broken recording does: stop the run, or be left out and counted.",
            "choices": ["error", "skip"],
        },
    )
    speed_perturbation: list[float] = field(
        default=None,
        metadata={"help": "Training rows are played at one of these speeds, drawn at random, such as 0.9 1.0 1.1."},
    )


@dataclass
class WhisperArguments:
    """Which Whisper to start from, and what it is to write."""

    model_name_or_path: str = field(default=None, metadata={"help": "Whisper to start from: Hub id or local folder."})
    config_name: str = field(
        default=None,
        metadata={"help": "Folder or Hub id with a configuration and tokenizer but no weights: train from scratch."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    language: str = field(
        default=None, metadata={"help": "Language of the speech, as a name or a code. English-only models need none."}
    )
    task: str = field(
        default="transcribe",
        metadata={
            "help": "Write the words as spoken, or translate into English.",
            "choices": ["transcribe", "translate"],
        },
    )
    timestamps: bool = field(
        default=False, metadata={"help": "Train and decode with the start and end time of every utterance."}
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Train the decoder only."})
    dropout: float = field(default=None, metadata={"help": "Dropout between layers. Default: the model's own."})
    apply_spec_augment: bool = field(
        default=False, metadata={"help": "Mask stripes of time and frequency in training (SpecAugment)."}
    )
    mask_time_prob: float = field(default=0.05, metadata={"help": "Share of the frames masked by SpecAugment."})
    mask_time_length: int = field(default=10, metadata={"help": "Frames of 10 ms in one time stripe."})
    mask_feature_prob: float = field(default=0.05, metadata={"help": "Share of the mel bins masked by SpecAugment."})
    mask_feature_length: int = field(default=10, metadata={"help": "Mel bins in one frequency stripe."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the frozen model in 8 bits under LoRA (CUDA and bitsandbytes)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen model in 4 bits under LoRA (CUDA and bitsandbytes)."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention kernel, as transformers names it."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise UserError(
                "Say which model to start from with --model_name_or_path (or --config_name to train from scratch), "
                "one of the two."
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("--load_in_8bit and --load_in_4bit exclude each other: keep one.")


@dataclass
class SpeechT5Arguments:
    """Which SpeechT5 to start from, whose voices it hears, and who listens to what it says."""

    model_name_or_path: str = field(default=None, metadata={"help": "SpeechT5 to start from: Hub id or local folder."})
    config_name: str = field(
        default=None,
        metadata={"help": "Folder or Hub id with a configuration and tokenizer but no weights: train from scratch."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    language: str = field(default="en", metadata={"help": "Language of the text, as a code, to spell numbers out."})
    spell_out: bool = field(
        default=True, metadata={"help": "Write numbers, currencies and abbreviations as they are spoken."}
    )
    add_characters: str = field(
        default=None, metadata={"help": "Characters that the tokenizer lacks and is to learn, such as äöüß."}
    )
    use_guided_attention_loss: bool = field(
        default=True, metadata={"help": "Press the attention towards the diagonal, as SpeechT5 does by itself."}
    )
    vocoder: str = field(
        default="hifigan",
        metadata={"help": "From spectrogram to sound: hifigan, griffin_lim, or path or Hub id of a SpeechT5HifiGan."},
    )
    speaker_encoder: str = field(
        default="microsoft/wavlm-base-plus-sv",
        metadata={
            "help": "What makes a speaker embedding of a recording: mel_statistics, a WavLMForXVector, or speechbrain/..."
        },
    )
    speaker_embedding_per: str = field(
        default="speaker",
        metadata={
            "help": "One embedding for each speaker, each utterance, or the whole dataset (one voice).",
            "choices": ["speaker", "utterance", "dataset"],
        },
    )
    speaker_embeddings_file: str = field(
        default=None,
        metadata={"help": "File of speaker embeddings: .safetensors (speaker to vector) or .npy (one for all)."},
    )
    asr_model_name_or_path: str = field(
        default="openai/whisper-base", metadata={"help": "Whisper that listens to what is synthesised."}
    )
    asr_language: str = field(default=None, metadata={"help": "Language that it hears. Default: that of the text."})
    mos_model: str = field(
        default=None,
        metadata={
            "help": "What estimates a mean opinion score: squim (not for commercial use), or a file of its weights."
        },
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the frozen model in 8 bits under LoRA (CUDA and bitsandbytes)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen model in 4 bits under LoRA (CUDA and bitsandbytes)."}
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise UserError(
                "Say which model to start from with --model_name_or_path (or --config_name to train from scratch), "
                "one of the two."
            )


@dataclass
class LoraArguments:
    """The adapter's shape; the names are those of peft's LoraConfig, as TRL spells them."""

    lora_r: int = field(default=32, metadata={"help": "Rank of the update matrices."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the update: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers to adapt: names, or all-linear."}
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: learn magnitude and direction apart."})


@dataclass
class SpeechTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with defaults for speech; every field of transformers' own is accepted.

    bf16 and fp16 are chosen by the hardware unless one of them is given; `choices` holds each such choice with its
    reason, for the log and the run record.
    """

    run_arguments, run_sources = {}, {}  # `parse` fills them
    output_dir: str = field(default=None, metadata={"help": "Folder for checkpoints, model, results and logs."})
    bf16: bool = field(default=None, metadata={"help": "bfloat16 mixed precision. Default: where the GPU has it."})
    fp16: bool = field(
        default=None, metadata={"help": "float16 mixed precision. Default: on a GPU that has no bfloat16."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where to log: tensorboard, wandb, none, ..."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float = field(default=500, metadata={"help": "Steps between evaluations (and checkpoints)."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept on disk, the best one among them."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})
    logging_steps: float = field(default=25, metadata={"help": "Steps between logged losses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses (costs a sync a step)."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint by WER."})
    metric_for_best_model: str = field(default="wer", metadata={"help": "Validation figure that decides."})
    greater_is_better: bool = field(default=False, metadata={"help": "Whether more of that figure is better."})
    early_stopping_patience: int = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better WER."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run remembers how patient early stopping has been."}
    )
    log_level: str = field(default="error", metadata={"help": "How much transformers itself says."})
    log_level_replica: str = field(
        default="error", metadata={"help": "How much transformers itself says in the processes beside the first."}
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate on generated text."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows in an evaluation batch."})
    dataloader_num_workers: int = field(
        default=None, metadata={"help": "Processes that decode audio. Default: the cores, at most 8 a process."}
    )
    max_batch_seconds: str = field(
        default=None,
        metadata={
            "help": "Seconds of padded audio in a batch of each device, instead of a number of rows; auto looks for "
            "the most that fits on the GPU."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows are decoded late."})
    hub_merge: bool = field(default=False, metadata={"help": "Push the whole model and not its adapter."})
    hub_tag: str = field(default=None, metadata={"help": "Name for the pushed commit, such as v1."})
    hub_create_pr: bool = field(
        default=False, metadata={"help": "Push as a pull request, also to a repository of others."}
    )
    label_names: list[str] = field(default_factory=lambda: ["labels"], metadata={"help": "Names of the targets."})
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "DDP's search for unused weights."})
    normalizer: str = field(
        default="auto",
        metadata={
            "help": "Text normaliser of the error rates; auto is english for English, marks elsewhere.",
            "choices": ["auto", "none", "basic", "english", "marks"],
        },
    )

    def __post_init__(self):
        if not self.output_dir:
            raise UserError("Say where the run may write with --output_dir FOLDER.")
        if self.hub_token:  # every checkpoint would hold it, readable
            raise UserError("--hub_token is not taken: type `hf auth login` once, or set HF_TOKEN.")
        for name in ("hub_merge", "hub_tag", "hub_create_pr"):
            if getattr(self, name) and not self.push_to_hub:
                raise UserError(f"--{name} does nothing without --push_to_hub true: add that, or leave it out.")
        if self.max_batch_seconds not in (None, "auto"):
            self.max_batch_seconds = _positive_number(self.max_batch_seconds, "--max_batch_seconds", "or auto")
        self.choices = []
        if not torch.accelerator.is_available():
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                self.use_cpu = True  # else each of the processes would run alone and unaware of the others
                self.choices.append("processes on the CPU, joined by gloo: no GPU")
            self.use_cpu = bool(self.use_cpu or self.bf16)  # transformers asks for it before bf16 on a CPU
        self.precision_is_open = False
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = False, False
            if self.use_cpu or not torch.cuda.is_available():
                self.precision_is_open = True  # on a CPU it depends on the model, too
            elif torch.cuda.is_bf16_supported(including_emulation=False):
                self.bf16 = True
                self.choices.append(f"bf16: {torch.cuda.get_device_name()} supports it")
            else:
                self.fp16 = True
                self.choices.append(f"fp16: {torch.cuda.get_device_name()} has no bf16")
        else:
            self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
            self.choices.append(f"{'bf16' if self.bf16 else 'fp16' if self.fp16 else 'fp32'}: given")
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers()
            self.choices.append(f"dataloader workers: {self.dataloader_num_workers}, from the number of cores")
        if self.eval_strategy == "no":
            if self.early_stopping_patience is not None:
                raise UserError("--early_stopping_patience needs evaluations: leave --eval_strategy no out.")
            self.load_best_model_at_end = False
            self.choices.append("the last checkpoint is kept, not the best: no evaluations")
        if self.accelerator_config is None:
            self.accelerator_config = {"even_batches": False}  # they differ in size
        self.dataloader_pin_memory = torch.cuda.is_available() and not self.use_cpu
        self.dataloader_persistent_workers = False  # each epoch's workers must see that epoch's random state
        super().__post_init__()
        unset_hf_deepspeed_config()  # under ZeRO-3 it has every model that is loaded sharded at once, judges among them


@dataclass
class WhisperTrainingArguments(SpeechTrainingArguments):
    """`SpeechTrainingArguments` and what only a Whisper has: a window."""

    encoder_window: str = field(
        default="auto",
        metadata={
            "help": "Seconds that the encoder is given in training: what a batch needs (auto), or always its full window, "
            "which is several times slower for short utterances; docs/performance.md compares the models.",
            "choices": ["auto", "full"],
        },
    )
    full_window_share: float = field(
        default=0.0,
        metadata={"help": "Share of the steps that auto pads to the full window, with fewer rows at the same cost."},
    )
    cache_encoder_outputs: bool = field(
        default=True, metadata={"help": "Run a frozen encoder once for each row, if nothing changes the rows."}
    )
    generation_cache_implementation: str = field(
        default="dynamic",
        metadata={
            "help": "Key and value cache in evaluation; transformers compiles the decoder for static on a GPU.",
            "choices": ["dynamic", "static"],
        },
    )

    def __post_init__(self):
        if not 0 <= self.full_window_share <= 1:
            raise UserError(f"--full_window_share has to lie between 0 and 1, not at {self.full_window_share:g}.")
        super().__post_init__()


@dataclass
class SpeechT5TrainingArguments(SpeechTrainingArguments):
    """`SpeechTrainingArguments` with what decides in speech synthesis: whether the words can be understood."""

    metric_for_best_model: str = field(default="cer", metadata={"help": "Validation figure that decides."})


def _positive_number(value, flag, otherwise):
    try:
        if 0 < (number := float(value)) < float("inf"):
            return number
    except ValueError:
        pass
    raise UserError(f"{flag} has to be a number above 0 {otherwise}, not {value}.")


def default_num_workers():
    """Returns how many processes decode audio: one a core, less one for training, at most 8 for each process."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_processes - 1))


# What may differ between two launches of the same run: where it writes and what it prints, never what it computes.
NOT_IDENTITY = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica", "use_cpu",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "logging_steps",
    "logging_strategy", "logging_first_step", "save_total_limit", "resume_from_checkpoint", "per_device_eval_batch_size",
    "accelerator_config", "on_bad_audio", "audio_root", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token",
    "hub_revision", "hub_always_push", "hub_merge", "hub_tag", "hub_create_pr", "project", "trackio_space_id",
}  # fmt: skip

# What `SpeechTrainingArguments` fills in by what the machine has.
CHOSEN_BY_HARDWARE = {"bf16", "fp16", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory"}

# Settings of transformers that are refused, and so never suggested.
_REFUSED = {"hub_token", "push_to_hub_token"}

# Settings that have a default and where null says something else: keep every checkpoint.
MAY_BE_NULL = {"save_total_limit"}


def parse(recipe_file, *dataclass_types, argv=None):
    """Reads a recipe's settings: an arguments file, then the flags of the command line, which win.

    The file is the first argument if that ends in .yaml or .yml, else `args.yaml` beside `recipe_file`. A key that no
    dataclass has, in the file or on the command line, stops the run, and all faults are listed at once.

    Args:
        recipe_file: path of the recipe's run.py (its `__file__`).
        *dataclass_types: the dataclasses to fill.
        argv: list of str, the command line without the program's name. Default: `sys.argv[1:]`.

    Returns:
        One instance for each dataclass. Every instance carries `run_arguments`, a JSON-able dict of all settings, and
        `run_sources`, where each of them comes from: `default`, the arguments file as it was written, `command line`, or
        `hardware` for what the program chose by the machine.

    Raises:
        UserError: unknown keys, values of the wrong type, an unreadable file, or settings that exclude each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        arguments_file = Path(argv.pop(0))
        if arguments_file.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"{arguments_file} is not an arguments file: put a .yaml file first, then flags such as --max_steps 100."
            )
    else:
        arguments_file = Path(recipe_file).parent / "args.yaml"
    return parse_arguments(read_arguments_file(arguments_file), argv, dataclass_types, source=arguments_file)


class _Loader(yaml.SafeLoader):
    """YAML without references: a few of them can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_arguments_file(path):
    """Returns the settings of a YAML arguments file as a dict, or raises a `UserError` that names the fault."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"Cannot read the arguments file {path} ({error.strerror}): check its path.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, no such day, a thousand brackets
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: write one `name: value` on each line.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a list of settings: write one `name: value` on each line.")
    return settings


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_arguments(settings, flags, dataclass_types, source="the arguments file"):
    """Fills the dataclasses from a dict of settings and a list of flags; see `parse`."""
    parser = _Parser(dataclass_types, allow_abbrev=False, add_help=True, prog="run.py [ARGS.yaml]")
    fields = {f.name: f for dtype in dataclass_types for f in dataclasses.fields(dtype) if f.init}
    known = set(fields)
    faults, tokens, sources = [], [], {}
    settings = _of_this_dataset(settings, flags, source)

    for name, value in settings.items():
        if name not in known:
            faults.append(f"{source}: there is no setting {name!r}.{nearest(name, known - _REFUSED)}")
        elif value is not None:
            tokens.append((str(source), _as_tokens(name, value)))
            sources[name] = str(source)
        elif fields[name].default is not None and name not in MAY_BE_NULL:
            faults.append(f"{source}: {name} cannot be null. Leave the line out for {parser.get_default(name)}.")
        else:
            parser.set_defaults(**{name: None})
            if fields[name].default is not None:
                sources[name] = str(source)
    for group in _group_flags(flags):
        name = group[0].partition("=")[0].lstrip("-").replace("-", "_")
        if not group[0].startswith("--"):
            faults.append(f"Command line: {group[0]!r} belongs to no setting. Write --name value.")
        elif name == "help" or name.removeprefix("no_") in known or name in known:
            tokens.append(("command line", group))
            sources[name if name in known else name.removeprefix("no_")] = "command line"
        else:
            flags_known = [f"--{other}" for other in known - _REFUSED]
            faults.append(f"Command line: there is no setting --{name}.{nearest(f'--{name}', flags_known)}")
    for where, group in tokens:
        try:
            _, stray = parser.parse_known_args(group)
            if stray:
                faults.append(f"{where}: {' '.join(stray)!r} belongs to no setting. Write --name value.")
        except UserError as error:
            faults.append(f"{where}: {str(error).removeprefix('argument ')}.")
    if faults:
        raise UserError("\n".join(faults))

    try:
        instances = parser.parse_args_into_dataclasses(
            [token for _, group in tokens for token in group], look_for_args_file=False
        )
    except UserError:
        raise
    except Exception as error:  # what transformers says of a value that it cannot take, in its own words
        raise UserError(f"{source}: {' '.join(str(error).split()) or type(error).__name__}") from None
    run_arguments = {}
    for instance in instances:
        for f in dataclasses.fields(instance):
            value = getattr(instance, f.name)
            if f.name not in ("hub_token", "push_to_hub_token"):
                run_arguments[f.name] = value if _is_plain(value) else str(value)
                if f.name in CHOSEN_BY_HARDWARE and f.name not in sources and value != f.default:
                    sources[f.name] = "hardware"
    run_sources = {name: sources.get(name, "default") for name in run_arguments}
    for instance in instances:
        instance.run_arguments, instance.run_sources = run_arguments, run_sources
    return instances


# What describes one dataset and seldom fits another.
_DATASET_SETTINGS = {
    "dataset_config_name", "dataset_revision", "dataset_weights", "train_split_name", "eval_split_name",
    "test_split_name", "audio_root", "audio_column_name", "text_column_name", "id_column_name", "speaker_column_name",
    "speaker_embedding_column_name", "speakers", "group_columns",
}  # fmt: skip


def _of_this_dataset(settings, flags, source):
    """Leaves aside what the file says of its dataset if the command line names another one."""
    given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if "dataset_name" not in given or "dataset_name" not in settings:
        return settings
    aside = [name for name in settings if name in _DATASET_SETTINGS and name not in given]
    if aside:
        logger.info("Left aside, for they describe the dataset of %s: %s", source, ", ".join(aside))
    return {name: value for name, value in settings.items() if name not in aside}


def _group_flags(flags):
    """Splits a command line into groups of one flag and its values."""
    groups = []
    for token in flags:
        if token.startswith("--") or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    return groups


def _as_tokens(name, value):
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}"]


def _is_plain(value):
    try:
        json.dumps(value)
    except TypeError:
        return False
    return not isinstance(value, argparse.Namespace)
