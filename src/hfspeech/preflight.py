"""Looks over a run before it is paid for: settings, access, data, labels, loss, memory and time."""

import itertools
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer_utils import has_length

from .arguments import (
    DataArguments,
    LoraArguments,
    SpeechTrainingArguments,
    WhisperArguments,
    parse_arguments,
    read_arguments_file,
)
from .augment import augment
from .batching import TRAIN_TAIL_S, WhisperCollator
from .data import load_speech
from .errors import UserError
from .metrics import TranscriptScore
from .modeling import decoder_input_ids
from .models import add_lora, enough_memory, load_whisper, quiet_transformers, whisper_of
from .runs import RUN_FILE, claim_folder, peak_rss_bytes, require_space
from .text import label_ids
from .training import ADAM_BYTES_PER_PARAMETER, SpeechTrainer

CHECKED_ROWS = 20
SHOWN_ROWS = 3
OVERFIT_ROWS = 4
OVERFIT_STEPS = 60
OVERFIT_LOSS = 0.1


def check(arguments_file, flags=(), overfit=False):
    """Goes through a run's settings, model and data, and measures one step; trains and writes nothing.

    Args:
        arguments_file: the recipe's arguments file. LoRA is on if a setting asks for it or the run.py beside it does.
        flags: list of str, settings that win over the file.
        overfit: also train on one small batch until it is learnt by heart.

    Raises:
        UserError: whatever would stop the run, or a batch that cannot be learnt.
    """
    settings = read_arguments_file(arguments_file)
    given = [*settings, *(flag.partition("=")[0].lstrip("-") for flag in flags if flag.startswith("--"))]
    recipe = Path(arguments_file).with_name("run.py")
    with_lora = any(name.startswith("lora_") or name == "use_dora" for name in given) or (
        recipe.exists() and "LoraArguments" in recipe.read_text(encoding="utf-8")
    )
    types = [DataArguments, WhisperArguments, SpeechTrainingArguments, *([LoraArguments] if with_lora else [])]
    data_args, model_args, train_args, *lora_args = parse_arguments(settings, flags, types, source=arguments_file)
    _passed("arguments", f"{'; '.join([str(arguments_file), *train_args.choices])}")

    output_dir = Path(train_args.output_dir)
    existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    claim_folder(existing, "--output_dir")
    going_on = "; it holds a run, which the same settings go on with" if (output_dir / RUN_FILE).exists() else ""
    _passed("output", f"{output_dir} can be written{going_on}")

    quiet_transformers()
    set_seed(train_args.seed)
    model, processor = load_whisper(model_args)
    if with_lora:
        model = add_lora(model, lora_args[0])
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _require_space(existing, model, train_args)
    _passed(
        "model",
        f"{model_args.model_name_or_path or model_args.config_name}: {num_parameters / 1e6:.1f} M parameters, "
        f"{num_trainable / 1e6:.1f} M of them trained "
        f"({'LoRA' if with_lora else 'no LoRA'})",
    )

    speech = load_speech(data_args, processor, train_args.seed, model.config.max_target_positions)
    speech["train"] = augment(speech["train"], data_args.speed_perturbation, processor, train_args.seed)
    sizes = (f"{name} {len(rows) if has_length(rows) else 'streamed'}" for name, rows in speech.items())
    _passed("data", f"rows left for {', '.join(sizes)}")

    train = speech["train"]
    rows = _spread(train, CHECKED_ROWS) if has_length(train) else list(itertools.islice(train, CHECKED_ROWS))
    fatal = [row["fatal"] for row in rows if row.get("fatal")]
    if fatal:
        raise UserError(fatal[0])
    bad = [row["bad_audio"] for row in rows if row["waveform"] is None]
    if (bad and data_args.on_bad_audio == "error") or len(bad) == len(rows):
        raise UserError(f"{bad[0]}. Leave such rows out with --on_bad_audio skip.")
    seconds = sum(row["duration_s"] for row in rows if row["waveform"] is not None)
    _passed("audio", f"{len(rows) - len(bad)} of {len(rows)} rows decoded, {seconds:.0f} s in all")

    with tempfile.TemporaryDirectory() as nowhere:  # Trainer makes its output folder, and a check leaves none
        train_args.output_dir, train_args.report_to, train_args.disable_tqdm = nowhere, [], True
        collator = WhisperCollator(processor, data_args.on_bad_audio)
        trainer = SpeechTrainer(
            model=model,
            args=train_args,
            train_dataset=train,
            eval_dataset=speech["validation"],
            data_collator=collator,
            compute_metrics=TranscriptScore(processor, data_args.group_columns, train_args.normalizer),
            processing_class=processor,
        )
        trainer.choose_max_batch_seconds()
        batch = next(iter(trainer.get_train_dataloader()))
        _show_batch(trainer, batch)
        worst = _check_labels(trainer, train, collator) if has_length(train) else batch
        with enough_memory("halve --per_device_train_batch_size and double --gradient_accumulation_steps"):
            with torch.no_grad(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(batch)).item()
            _passed("loss", f"{loss:.2f} at step 0 on one batch")
            _estimate(trainer, batch, worst, speech)
            if overfit:
                _overfit(trainer, collator([row for row in rows if row["waveform"] is not None][:OVERFIT_ROWS]))


def _passed(step, what):
    print(f"ok  {step:<10} {what}", flush=True)


def _spread(dataset, count):
    """Returns `count` decoded rows, spread evenly over a dataset."""
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]


def _require_space(folder, model, train_args):
    trained = [p for p in model.parameters() if p.requires_grad]
    checkpoint = sum(p.numel() * (p.element_size() + ADAM_BYTES_PER_PARAMETER) for p in trained)
    require_space(folder, checkpoint * ((train_args.save_total_limit or 2) + 1))


def _show_batch(trainer, batch):
    """Prints some labels of a batch as the decoder reads and writes them, special tokens and all."""
    tokenizer = trainer.processing_class.tokenizer
    shape = "×".join(str(size) for size in batch["input_features"].shape)
    _passed("batch", f"features {shape}; the decoder reads, and is to write:")
    inputs = decoder_input_ids(whisper_of(trainer.model).config, batch["labels"])
    for read, written in list(zip(inputs, batch["labels"]))[:SHOWN_ROWS]:
        written = written[written != -100]
        print(f"      reads   {_spelled(tokenizer, read[: len(written)])}")
        print(f"      writes  {_spelled(tokenizer, written)}")


def _spelled(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, decode_with_timestamps=True)


def _check_labels(trainer, dataset, collator):
    """Compares the longest label with the model's limit, and returns the batch with the longest labels."""
    texts, durations_s = dataset.column("text"), dataset.column("duration_s")
    by_length = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    tokenizer = trainer.processing_class.tokenizer
    # Characters tell roughly how many tokens there are, so the longest label is among the longest texts.
    lengths = {i: len(label_ids(tokenizer, texts[i], durations_s[i])) for i in by_length[:200]}
    longest = max(lengths, key=lengths.get)
    limit = whisper_of(trainer.model).config.max_target_positions
    if lengths[longest] > limit:
        raise UserError(
            f"Row {dataset.record(longest)['row']} has {lengths[longest]} label tokens and the model takes {limit}: "
            f"leave it out or split it; it begins {texts[longest][:60]!r}."
        )
    _passed("labels", f"the longest has {lengths[longest]} tokens; the model takes {limit}")
    wordy = sorted(lengths, key=lengths.get, reverse=True)
    padded_s = min(
        max(durations_s[index] for index in wordy) + TRAIN_TAIL_S[1],
        trainer.processing_class.feature_extractor.chunk_length,
    )
    seconds = trainer.max_batch_seconds
    batch_size = max(1, int(seconds // padded_s)) if seconds else trainer.args.per_device_train_batch_size
    return collator([dataset[index, padded_s] for index in wordy[:batch_size]])


def _estimate(trainer, batch, worst, speech):
    """Times a training step and a small evaluation, and works out what the whole run will take."""
    args, train = trainer.args, trainer.train_dataset
    trainer.create_optimizer()
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # measures without learning
    _train_step(trainer, worst or batch)  # the most memory; and the first step is slower than the others
    started = time.perf_counter()
    _train_step(trainer, batch)
    step_s = (time.perf_counter() - started) * args.gradient_accumulation_steps
    global_batch = len(batch["index"]) * args.gradient_accumulation_steps
    if args.max_steps > 0:
        steps = args.max_steps
    else:
        steps = math.ceil(trainer.train_sampler.steps_per_epoch * args.num_train_epochs)

    validation = speech["validation"]
    sample = validation.select(range(min(args.per_device_eval_batch_size, len(validation))))
    started = time.perf_counter()
    trainer.evaluation_loop(trainer.get_eval_dataloader(sample), "check", metric_key_prefix="check")
    row_s = (time.perf_counter() - started) / len(sample)
    every = {"steps": args.eval_steps if args.eval_steps >= 1 else args.eval_steps * steps, "epoch": None, "no": None}
    evaluations = steps // every[args.eval_strategy] if every.get(args.eval_strategy) else 0
    if args.eval_strategy == "epoch":
        evaluations = math.ceil(steps / trainer.train_sampler.steps_per_epoch) if has_length(train) else 1
    evaluations += bool(args.eval_on_start)
    measured_twice = sum(len(rows) for name, rows in speech.items() if name in ("test", "retention"))
    evaluation_s = row_s * (evaluations * len(validation) + 2 * measured_twice)

    if torch.cuda.is_available() and not args.use_cpu:
        memory, where = torch.cuda.max_memory_allocated(), "of the GPU"
    else:
        memory, where = peak_rss_bytes(), "of this process"
    _passed(
        "memory", f"{memory / 2**30:.1f} GB {where} at most{'' if worst is batch else ', with the longest labels'}"
    )
    _passed(
        "time",
        f"about {_duration(steps * step_s + evaluation_s)} in one process like this one: {steps} steps of "
        f"{global_batch} rows at {step_s:.2f} s, and {_duration(evaluation_s)} to evaluate "
        f"({int(evaluations)} times on validation, twice on test)",
    )


def _train_step(trainer, batch):
    """Takes one optimizer step as the trainer does, and returns the loss before it."""
    num_tokens = batch["labels"].ne(-100).sum().to(trainer.args.device)
    loss = trainer.training_step(trainer.model_wrapped, batch, num_items_in_batch=num_tokens)
    if trainer.args.max_grad_norm:
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return loss.item()


def _overfit(trainer, batch):
    """Trains on one small batch, which everything that can learn at all learns by heart."""
    whisper_of(trainer.model).config.apply_spec_augment = False  # what is masked cannot be learnt by heart
    for group in trainer.optimizer.param_groups:
        group["lr"] = trainer.args.learning_rate
    losses = []
    while len(losses) < OVERFIT_STEPS and (not losses or losses[-1] > OVERFIT_LOSS):
        losses.append(_train_step(trainer, batch))
    rows = len(batch["index"])
    if not losses[-1] <= OVERFIT_LOSS:
        raise UserError(
            f"The loss on {rows} rows fell only from {losses[0]:.2f} to {losses[-1]:.2f} in {OVERFIT_STEPS} steps, "
            f"not under {OVERFIT_LOSS}: see that the batch above is right, then raise --learning_rate "
            f"(now {trainer.args.learning_rate:g})."
        )
    _passed("overfit", f"the loss on {rows} rows fell from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps")


def _duration(seconds):
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
