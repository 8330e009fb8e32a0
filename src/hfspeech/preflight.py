"""Looks over a run before it is paid for: settings, access, data, labels, loss, memory and time."""

import dataclasses
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
    SpeechT5Arguments,
    SpeechT5TrainingArguments,
    WhisperArguments,
    WhisperTrainingArguments,
    parse_arguments,
    read_arguments_file,
)
from .augment import augment
from .batching import TRAIN_TAIL_S, SpeechT5Collator, WhisperCollator
from .data import load_speech
from .errors import UserError
from .inference import Listener
from .metrics import SynthesisScore, TranscriptScore
from .modeling.whisper import decoder_input_ids
from .models.loading import base_of, enough_memory, quiet_transformers
from .models.lora import add_lora
from .models.opinion import load_mos_model
from .models.speecht5 import load_speecht5
from .models.vocoders import load_vocoder
from .models.whisper import load_whisper
from .runs import RUN_FILE, claim_folder, peak_rss_bytes, require_push_allowed, require_space
from .text import label_ids
from .training.speecht5 import SpeechT5Trainer
from .training.trainer import ADAM_BYTES_PER_PARAMETER
from .training.whisper import WhisperTrainer
from .voices import find_voices, load_speaker_encoder

CHECKED_ROWS = 20
SHOWN_ROWS = 3
OVERFIT_ROWS = 4
OVERFIT_STEPS = 60


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
    story = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    with_lora = any(name.startswith("lora_") or name == "use_dora" for name in given) or "LoraArguments" in story
    own = {f.name for f in dataclasses.fields(SpeechT5Arguments)} - {
        f.name for f in dataclasses.fields(WhisperArguments)
    }
    family = _SpeechT5 if "SpeechT5Arguments" in story or own & set(given) else _Whisper
    types = [DataArguments, *family.arguments, *([LoraArguments] if with_lora else [])]
    data_args, model_args, train_args, *lora_args = parse_arguments(settings, flags, types, source=arguments_file)
    _passed("arguments", f"{'; '.join([str(arguments_file), *train_args.choices])}")

    output_dir = Path(train_args.output_dir)
    existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    claim_folder(existing, "--output_dir")
    going_on = "; it holds a run, which the same settings go on with" if (output_dir / RUN_FILE).exists() else ""
    _passed("output", f"{output_dir} can be written{going_on}")
    if train_args.push_to_hub:
        _passed("hub", f"{require_push_allowed(train_args)} can be written, too")

    quiet_transformers()
    set_seed(train_args.seed)
    run = family(data_args, model_args, train_args)
    if with_lora:
        run.model = add_lora(run.model, lora_args[0])
    model = run.model
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _require_space(existing, model, train_args)
    _passed(
        "model",
        f"{model_args.model_name_or_path or model_args.config_name}: {num_parameters / 1e6:.1f} M parameters, "
        f"{num_trainable / 1e6:.1f} M of them trained "
        f"({'LoRA' if with_lora else 'no LoRA'})",
    )

    speech = run.load_speech()
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
        trainer = run.trainer(speech)
        collator = trainer.data_collator
        trainer.choose_max_batch_seconds()
        batch = next(iter(trainer.get_train_dataloader()))
        run.show_batch(trainer, batch)
        worst = run.worst_batch(trainer, train) if has_length(train) else batch
        with enough_memory("halve --per_device_train_batch_size and double --gradient_accumulation_steps"):
            with torch.no_grad(), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(batch)).item()
            _passed("loss", f"{loss:.2f} at step 0 on one batch")
            _estimate(trainer, batch, worst, speech)
            if overfit:
                batch = collator([row for row in rows if row["waveform"] is not None][:OVERFIT_ROWS])
                _overfit(trainer, batch, run.learnt_loss)


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


class _Whisper:
    """What is to be looked at in a run that fine-tunes a Whisper."""

    arguments = (WhisperArguments, WhisperTrainingArguments)
    learnt_loss = staticmethod(lambda first: 0.1)

    def __init__(self, data_args, model_args, train_args):
        self.data_args, self.train_args = data_args, train_args
        self.model, self.processor = load_whisper(model_args)

    def load_speech(self):
        seed = self.train_args.seed
        speech = load_speech(self.data_args, self.processor, seed, self.model.config.max_target_positions)
        speech["train"] = augment(speech["train"], self.data_args.speed_perturbation, self.processor, seed)
        return speech

    def trainer(self, speech):
        normalizer = self.train_args.normalizer
        return WhisperTrainer(
            model=self.model,
            args=self.train_args,
            train_dataset=speech["train"],
            eval_dataset=speech["validation"],
            data_collator=WhisperCollator(self.processor, self.data_args.on_bad_audio),
            compute_metrics=TranscriptScore(self.processor, self.data_args.group_columns, normalizer),
            processing_class=self.processor,
        )

    def show_batch(self, trainer, batch):
        """Prints some labels of a batch as the decoder reads and writes them, special tokens and all."""
        shape = "×".join(str(size) for size in batch["input_features"].shape)
        _passed("batch", f"features {shape}; the decoder reads, and is to write:")
        inputs = decoder_input_ids(base_of(trainer.model).config, batch["labels"])
        for read, written in list(zip(inputs, batch["labels"]))[:SHOWN_ROWS]:
            written = written[written != -100]
            print(f"      reads   {self._spelled(read[: len(written)])}")
            print(f"      writes  {self._spelled(written)}")

    def _spelled(self, ids):
        return self.processor.tokenizer.decode(ids, skip_special_tokens=False, decode_with_timestamps=True)

    def worst_batch(self, trainer, dataset):
        """Compares the longest label with the model's limit, and returns the batch with the longest labels."""
        texts, durations_s = dataset.column("text"), dataset.column("duration_s")
        by_length = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        tokenizer = self.processor.tokenizer
        # Characters tell roughly how many tokens there are, so the longest label is among the longest texts.
        lengths = {i: len(label_ids(tokenizer, texts[i], durations_s[i])) for i in by_length[:200]}
        longest = max(lengths, key=lengths.get)
        limit = base_of(trainer.model).config.max_target_positions
        if lengths[longest] > limit:
            raise UserError(
                f"Row {dataset.record(longest)['row']} has {lengths[longest]} label tokens and the model takes {limit}: "
                f"leave it out or split it; it begins {texts[longest][:60]!r}."
            )
        _passed("labels", f"the longest has {lengths[longest]} tokens; the model takes {limit}")
        wordy = sorted(lengths, key=lengths.get, reverse=True)
        padded_s = min(
            max(durations_s[index] for index in wordy) + TRAIN_TAIL_S[1], self.processor.feature_extractor.chunk_length
        )
        seconds = trainer.max_batch_seconds
        batch_size = max(1, int(seconds // padded_s)) if seconds else trainer.args.per_device_train_batch_size
        return trainer.data_collator([dataset[index, padded_s] for index in wordy[:batch_size]])


class _SpeechT5:
    """What is to be looked at in a run that fine-tunes a SpeechT5."""

    arguments = (SpeechT5Arguments, SpeechT5TrainingArguments)
    # The decoder's dropout stays on, so no spectrogram is ever learnt by heart; a model that learns at all gets nearer.
    learnt_loss = staticmethod(lambda first: 0.9 * first)

    def __init__(self, data_args, model_args, train_args):
        self.data_args, self.model_args, self.train_args = data_args, model_args, train_args
        self.model, self.processor, self.front_end = load_speecht5(model_args)

    def load_speech(self):
        limit = self.model.config.max_text_positions
        speech = load_speech(self.data_args, self.processor, self.train_args.seed, limit, self.front_end)
        self.encoder = load_speaker_encoder(self.model_args.speaker_encoder)
        self.voices = find_voices(speech, self.model_args, self.encoder)
        _passed("voices", f"{len(self.voices.embeddings) or 'a column'} of them, one per {self.voices.per}")
        return speech

    def trainer(self, speech):
        model_args, data_args = self.model_args, self.data_args
        listener = Listener(model_args.asr_model_name_or_path, model_args.asr_language or model_args.language)
        opinion = load_mos_model(model_args.mos_model)
        groups, normalizer = data_args.group_columns, self.train_args.normalizer
        config = base_of(self.model).config
        return SpeechT5Trainer(
            model=self.model,
            args=self.train_args,
            train_dataset=speech["train"],
            eval_dataset=speech["validation"],
            data_collator=SpeechT5Collator(
                self.processor, self.front_end, self.voices, config, data_args.on_bad_audio
            ),
            compute_metrics=SynthesisScore(listener, self.encoder, groups, normalizer, model_args.language, opinion),
            processing_class=self.processor,
            vocoder=load_vocoder(model_args.vocoder),
        )

    def show_batch(self, trainer, batch):
        """Prints some texts of a batch as the model reads them, and how much silence was cut off."""
        shape = "×".join(str(size) for size in batch["labels"].shape)
        _passed("batch", f"spectrograms {shape}; the model reads:")
        for ids, mask in list(zip(batch["input_ids"], batch["attention_mask"]))[:SHOWN_ROWS]:
            print(f"      {' '.join(self.processor.tokenizer.convert_ids_to_tokens(ids[mask == 1]))}")
        count = max(len(batch["trimmed_s"]), 1)
        _passed("silence", f"{sum(batch['trimmed_s']) / count:.2f} s cut off the ends of a recording, on average")

    def worst_batch(self, trainer, dataset):
        """Returns the batch of the longest recordings."""
        durations_s = dataset.column("duration_s")
        longest = sorted(range(len(durations_s)), key=lambda index: -durations_s[index])
        seconds = trainer.max_batch_seconds
        rows = int(seconds // durations_s[longest[0]]) if seconds else trainer.args.per_device_train_batch_size
        return trainer.data_collator([dataset[index] for index in longest[: max(1, rows)]])


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


def _overfit(trainer, batch, learnt_loss):
    """Trains on one small batch, which everything that can learn at all learns by heart.

    Args:
        learnt_loss: function of the loss before the first step; the batch is learnt when the loss is no higher.
    """
    base_of(trainer.model).config.apply_spec_augment = False  # what is masked cannot be learnt by heart
    for group in trainer.optimizer.param_groups:
        group["lr"] = trainer.args.learning_rate
    losses = []
    while len(losses) < OVERFIT_STEPS and (not losses or losses[-1] > learnt_loss(losses[0])):
        losses.append(_train_step(trainer, batch))
    rows = len(batch["index"])
    if not losses[-1] <= learnt_loss(losses[0]):
        raise UserError(
            f"The loss on {rows} rows fell only from {losses[0]:.2f} to {losses[-1]:.2f} in {OVERFIT_STEPS} steps, "
            f"not under {learnt_loss(losses[0]):.2g}: see that the batch above is right, then raise --learning_rate "
            f"(now {trainer.args.learning_rate:g})."
        )
    _passed("overfit", f"the loss on {rows} rows fell from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps")


def _duration(seconds):
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
