"""Fine-tune Whisper the published Hugging Face way, and note what each part of it costs.

This is the rival the benches run beside: the procedure of transformers' `run_speech_recognition_seq2seq.py` example,
of its README, and of the blog post "Fine-Tune Whisper", written anew from their documentation. It imports nothing of
the package it is compared with. Two arms:

- **B1**, as documented: `Dataset.map` turns each recording into log-mel features padded to the extractor's window
  (30 s) and writes them to disk as lists of floats; rows come back as Python lists, in the training process; gradient
  checkpointing; fp16 where there is CUDA, and fp32 elsewhere, for fp16 training does not exist on a CPU; evaluation by
  `generate` in batches of 16.
- **B2**, the same procedure tuned by somebody who knows it: bf16 autocast, no checkpointing, rows read as numpy arrays
  by worker processes, smaller writes while preparing, evaluation in batches of 64, TF32 on a GPU.

Both arms have the library's own defaults of today where the documentation says nothing: SDPA attention and the fused
AdamW among them. Two things differ from the documentation, in both arms. (1) The `Audio` column of `datasets` decodes
through FFmpeg's libraries, so it is replaced by its like: a column of file paths, decoded by soundfile (and resampled
by torchaudio where needed) inside the mapped function, which is where the `Audio` column would decode too. (2) No
checkpoint is written on the way, because saving is not what is compared.

    python bench/rivals/whisper_hf.py --arm B1 --model_name_or_path assets/nano_whisper \
        --dataset_dir assets/espeak_digits --output_dir outputs/b1 --max_steps 20 --do_train --do_eval

It leaves the trained model and `timing.json` in the output folder; `bench/rivals/README.md` explains each entry. Needs
Linux, for the start time of the process and its peak memory.
"""

import argparse
import contextlib
import csv
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import jiwer
import soundfile
import torch
import torchaudio
from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

# The command in the example's README, but for gradient accumulation, which is left out: the Trainer multiplies
# Whisper's loss by it.
PUBLISHED = dict(
    max_steps=5000,
    per_device_train_batch_size=16,
    learning_rate=1e-5,
    warmup_steps=500,
    lr_scheduler_type="linear",
    seed=42,
    generation_max_length=225,
)


def read_rows(dataset_dir, split, limit=None):
    """Rows of one split of an audio folder: a list of `{"path", "text"}`, in the order of its `metadata.csv`.

    The transcript is the column `transcription`, as audio folders name it, or else `text`.
    """
    folder = Path(dataset_dir) / split
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = [
            {"path": str(folder / row["file_name"]), "text": row.get("transcription") or row["text"]}
            for row in csv.DictReader(file)
        ]
    return rows[:limit]


def load_model(model_dir, config_only=False, language="en", task="transcribe"):
    """Model and processor of a local folder; weights are random (from torch's seed) where the folder has none.

    Weights are float32, as mixed precision needs them. Language and task go where the documentation puts them: into
    the tokenizer's prefix and the generation config, for multilingual models only.
    """
    model_dir = Path(model_dir)
    processor = WhisperProcessor.from_pretrained(model_dir)
    if config_only or not any(model_dir.glob("*.safetensors")):
        model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(model_dir))
        if (model_dir / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(model_dir)
    else:
        model = WhisperForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    if getattr(model.generation_config, "is_multilingual", False):
        processor.tokenizer.set_prefix_tokens(language=language, task=task)
        model.generation_config.language = language
        model.generation_config.task = task
    model.generation_config.forced_decoder_ids = None
    return model, processor


def prepare(rows, processor, arm, cache_dir, max_duration_s=None):
    """The documented `map` and `filter`: features, labels and `input_length` (samples) of every row, on disk.

    rows: list of `{"path", "text"}`. Rows as long as `max_duration_s` or longer are dropped; None keeps all.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    # By default a process holds 1,000 rows (1 GB) before it writes them; with 100 it is quicker, and smaller.
    writer_batch_size = 1000 if arm == "B1" else 100

    def prepare_row(row):
        torch.set_num_threads(1)  # the README's remedy: a forked OpenMP pool may hang
        waveform, sampling_rate = soundfile.read(row["path"], dtype="float32", always_2d=True)
        waveform = waveform.mean(axis=1)
        if sampling_rate != extractor.sampling_rate:
            waveform = torchaudio.functional.resample(
                torch.from_numpy(waveform), sampling_rate, extractor.sampling_rate
            ).numpy()
        features = extractor(waveform, sampling_rate=extractor.sampling_rate).input_features[0]
        return {
            "input_features": features,
            "labels": tokenizer(row["text"]).input_ids,
            "input_length": len(waveform),
        }

    # From a generator, the table lies in the cache folder as a loaded dataset does. A table made in memory would keep
    # what `map` yields in memory, too.
    table = datasets.Dataset.from_generator(lambda rows: rows, gen_kwargs={"rows": rows}, cache_dir=str(cache_dir))
    table = table.map(
        prepare_row,
        remove_columns=table.column_names,
        num_proc=min(16, _cores()),  # the README's 16, on a machine that has them
        writer_batch_size=writer_batch_size,
    )
    if max_duration_s is not None:
        max_length = max_duration_s * extractor.sampling_rate
        table = table.filter(lambda length: 0 < length < max_length, input_columns=["input_length"])
    return table.with_format("numpy") if arm == "B2" else table


@dataclass
class PaddingCollator:
    """The documented collator: stacks features, pads labels with -100, drops a start token that the model adds itself.

    Hands on `input_length` (samples of each row), which the documentation has the Trainer drop.
    """

    processor: WhisperProcessor
    decoder_start_token_id: int

    def __call__(self, rows):
        batch = self.processor.feature_extractor.pad(
            [{"input_features": row["input_features"]} for row in rows], return_tensors="pt"
        )
        padded = self.processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        labels = padded.input_ids.masked_fill(padded.attention_mask == 0, -100)
        if bool((labels[:, 0] == self.decoder_start_token_id).all()):
            labels = labels[:, 1:]
        batch["labels"] = labels
        batch["input_length"] = torch.tensor([int(row["input_length"]) for row in rows])
        return batch


class MeasuredTrainer(Seq2SeqTrainer):
    """The stock trainer, which also notes how much audio each training step was given.

    It is taken from the batch, because a collator in a worker process could not tell the training process otherwise.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples_per_step = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.samples_per_step.append(inputs.pop("input_length").sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("input_length")
        return super().prediction_step(model, inputs, *args, **kwargs)


class Stopwatch(TrainerCallback):
    """Notes the time of every step, and what was on disk and in memory before the first of them."""

    def __init__(self, started, folders):
        self.started = started
        self.folders = folders
        self.bytes_at_start = _bytes_in(folders)
        self.timing = {"step_s": [], "compute_s": [], "evaluations": []}

    def on_train_begin(self, args, state, control, **kwargs):
        self.step_ended = _now()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.timing["step_s"]:
            self.timing["disk_before_first_step_bytes"] = _bytes_in(self.folders) - self.bytes_at_start
            self.timing["peak_rss_preparing_bytes"] = _peak_rss(resource.RUSAGE_SELF)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew from here
        self.step_began = _now()

    def on_step_end(self, args, state, control, **kwargs):
        now = _now()
        self.timing.setdefault("first_step_s", now - self.started)
        self.timing["step_s"].append(now - self.step_ended)
        self.timing["compute_s"].append(now - self.step_began)
        self.step_ended = now

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.step_ended = _now()  # the next step does not pay for the evaluation
        self.timing["evaluations"].append(
            {
                "seconds": self.step_ended - self.started,
                "step": state.global_step,
                "wer": metrics["eval_wer"],
                "loss": metrics["eval_loss"],
                "evaluation_s": metrics["eval_runtime"],
            }
        )


def train(arm, model, processor, train_rows, eval_rows, output_dir, *, eval_steps=None, started=None, **settings):
    """Prepare, train and evaluate by one arm; returns the trainer (its `model` is trained) and the timing, a dict.

    arm: "B1" or "B2". train_rows, eval_rows: lists of `{"path", "text"}`; without train_rows nothing is trained,
    without eval_rows nothing is evaluated. eval_steps: evaluate every so many steps as well as at the end; None:
    only at the end. started: `time.time()` from which times count; None: this call. settings: arguments of
    `Seq2SeqTrainingArguments` that win over `PUBLISHED` and over those of the arm. The timing is written to
    `timing.json` in the output folder, the model beside it.
    """
    started = time.time() if started is None else started
    output_dir = Path(output_dir)
    cache_dir = Path(os.environ.get("HF_DATASETS_CACHE", output_dir / "cache"))
    stopwatch = Stopwatch(started, {output_dir, cache_dir})
    cuda = torch.cuda.is_available()
    if arm == "B1":
        arm_settings = dict(activation_checkpointing=True, fp16=cuda, per_device_eval_batch_size=16)
        # As documented beside checkpointing; `generate` goes by its own config, and keeps its cache.
        model.config.use_cache = False
    else:
        arm_settings = dict(
            bf16=True,
            tf32=cuda or None,
            per_device_eval_batch_size=64,
            dataloader_num_workers=max(1, min(8, _cores() - 1)),
            dataloader_persistent_workers=True,
            optim="adamw_torch_fused",
        )
    settings = {**PUBLISHED, **arm_settings, **settings}
    # The nano model's decoder has fewer positions than the published 225 tokens.
    settings["generation_max_length"] = min(settings["generation_max_length"], model.config.max_target_positions)
    training_args = Seq2SeqTrainingArguments(
        output_dir=str(output_dir),
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        predict_with_generate=True,
        use_cpu=not cuda,
        remove_unused_columns=False,  # or `input_length` would not arrive; the collator takes what it needs
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        **settings,
    )

    window_s = processor.feature_extractor.chunk_length
    train_table = prepare(train_rows, processor, arm, cache_dir, max_duration_s=window_s) if train_rows else None
    eval_table = prepare(eval_rows, processor, arm, cache_dir) if eval_rows else None
    processor.save_pretrained(output_dir)

    def word_error_rate(prediction):
        label_ids = prediction.label_ids
        label_ids[label_ids == -100] = processor.tokenizer.pad_token_id
        hypotheses = processor.tokenizer.batch_decode(prediction.predictions, skip_special_tokens=True)
        references = processor.tokenizer.batch_decode(label_ids, skip_special_tokens=True)
        return {"wer": jiwer.wer(references, hypotheses)}

    trainer = MeasuredTrainer(
        model=model,
        args=training_args,
        train_dataset=train_table,
        eval_dataset=eval_table,
        data_collator=PaddingCollator(processor, model.config.decoder_start_token_id),
        compute_metrics=word_error_rate,
        processing_class=processor.feature_extractor,
        callbacks=[stopwatch],
    )
    timing = stopwatch.timing
    timing.update(arm=arm, device=torch.cuda.get_device_name() if cuda else "cpu")
    if train_table is not None:
        timing["train_loss"] = trainer.train().training_loss
        samples = torch.stack(trainer.samples_per_step).tolist()
        timing["audio_s"] = [count / processor.feature_extractor.sampling_rate for count in samples]
        timing["peak_rss_training_bytes"] = _peak_rss(resource.RUSAGE_SELF)
        timing["peak_rss_largest_child_bytes"] = _peak_rss(resource.RUSAGE_CHILDREN)
        timing["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        trainer.save_model()
    if eval_table is not None:
        began = _now()
        metrics = trainer.evaluate()
        timing.update(evaluation_s=_now() - began, evaluated_rows=len(eval_table), wer=metrics["eval_wer"])
        timing["evaluated_audio_s"] = int(sum(eval_table["input_length"])) / processor.feature_extractor.sampling_rate
    (output_dir / "timing.json").write_text(json.dumps(timing, indent=1) + "\n")
    return trainer, timing


def _cores():
    return len(os.sched_getaffinity(0))


def _now():
    """Seconds since the epoch, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def _peak_rss(who):
    return resource.getrusage(who).ru_maxrss * 1024


def _bytes_in(folders):
    files = {file for folder in folders for file in Path(folder).resolve().rglob("*") if file.is_file()}
    return sum(file.stat().st_size for file in files)


def _process_start():
    """When this process began, in seconds since the epoch: what the launcher says, or else what the kernel says."""
    if "HFSPEECH_BENCH_STARTED" in os.environ:
        return float(os.environ["HFSPEECH_BENCH_STARTED"])
    ticks_after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, proc(5)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks_after_boot / os.sysconf("SC_CLK_TCK")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arm", choices=("B1", "B2"), required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_dir", required=True, help="folder with splits, each with its metadata.csv")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--config_only", action="store_true", help="random weights, drawn from --seed")
    parser.add_argument("--language", default="en")
    parser.add_argument("--eval_split_name", default="test")
    parser.add_argument("--limit_train", type=int, help="rows; all by default")
    parser.add_argument("--limit_eval", type=int, help="rows; all by default")
    parser.add_argument("--do_train", action="store_true")
    parser.add_argument("--do_eval", action="store_true")
    parser.add_argument("--eval_steps", type=int, help="evaluate on the way, too; needs --do_eval")
    for name, value in PUBLISHED.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    if not (options.do_train or options.do_eval):
        parser.error("give --do_train, --do_eval, or both")
    if options.eval_steps and not options.do_eval:
        parser.error("--eval_steps needs --do_eval")

    train_rows = read_rows(options.dataset_dir, "train", options.limit_train) if options.do_train else None
    eval_rows = (
        read_rows(options.dataset_dir, options.eval_split_name, options.limit_eval) if options.do_eval else None
    )
    set_seed(options.seed)
    model, processor = load_model(options.model_name_or_path, options.config_only, options.language)
    _, timing = train(
        options.arm,
        model,
        processor,
        train_rows,
        eval_rows,
        options.output_dir,
        eval_steps=options.eval_steps,
        started=_process_start(),
        **{name: getattr(options, name) for name in PUBLISHED},
    )
    print(json.dumps({name: value for name, value in timing.items() if not isinstance(value, list)}, indent=1))


if __name__ == "__main__":
    main()
