"""Fine-tune SpeechT5 the published Hugging Face way: what `bench/train_tts.py` measures hfspeech against.

The procedure of the Hugging Face audio course, unit 6, "Fine-tuning SpeechT5", which is that of transformers' task guide
on text-to-speech, written anew from their documentation. It imports nothing of the package it is compared with. Arms:

- **B1**, as documented: `Dataset.map` in one process turns each recording into a log-mel spectrogram and writes it to disk
  as lists of floats, and rows of 200 tokens or more are dropped; rows come back as Python lists, in the training process;
  4 rows a batch drawn at random and padded to its longest, 8 batches a step; gradient checkpointing; learning rate 1e-5
  after 500 warm-up steps. The course's fp16 is used on CUDA; a CPU has no fp16 training, and trains in fp32.
- **B2**, the same procedure tuned by somebody who knows it: no checkpointing, 32 rows in one batch, rows read as numpy
  arrays by a worker process and prepared by one process for each core, bf16 on CUDA and on a CPU with instructions for it.
- **B2_by_length**: B2 with the Trainer's own batches of rows of like length, `group_by_length`.

What the library does by itself stays: guided attention with every attention weight made by hand, a tenth of the layers
dropped at random (which saves these arms a tenth of their work), the fused AdamW. Three things differ from the documentation, in all arms. (1) The `Audio` column of
`datasets` decodes through FFmpeg's libraries, so recordings are decoded by soundfile inside the mapped function, which is
where the `Audio` column would decode too. (2) The speaker embeddings are read from a column instead of made by
SpeechBrain on the way. (3) Nothing is evaluated, and no checkpoint is written.

transformers multiplies SpeechT5's loss by the number of accumulation steps, so that B1 clips its gradients harder than it
says; how long a step takes does not depend on that.

    python bench/rivals/speecht5_course.py --arm B1 --model_name_or_path MODEL --dataset_dir FOLDER \
        --output_dir outputs/course --max_steps 20

FOLDER holds `train/metadata.parquet` with the columns file_name (from `train/`; 16 kHz), text and speaker_embeddings.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import soundfile
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SpeechT5ForTextToSpeech,
    SpeechT5Processor,
    set_seed,
)

PUBLISHED = {"learning_rate": 1e-5, "warmup_steps": 500, "logging_steps": 25, "label_names": ["labels"]}
TUNED = {"per_device_train_batch_size": 32, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
ARMS = {
    "B1": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "activation_checkpointing": True,
    },
    "B2": TUNED,
    # The Trainer would drop the column of lengths before it asks for it.
    "B2_by_length": TUNED | {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
}
MOST_TOKENS = 200


def prepare(folder, processor, arm):
    """The documented `map` and `filter`: tokens, spectrogram and speaker embedding of every row of a folder, on disk."""
    table = datasets.load_dataset("parquet", data_files=str(folder / "metadata.parquet"), split="train")

    def prepare_row(row):
        waveform, sampling_rate = soundfile.read(folder / row["file_name"], dtype="float32")
        prepared = processor(
            text=row["text"], audio_target=waveform, sampling_rate=sampling_rate, return_attention_mask=False
        )
        prepared["labels"] = prepared["labels"][0]
        prepared["speaker_embeddings"] = row["speaker_embeddings"]
        if arm == "B2_by_length":
            prepared["length"] = len(prepared["labels"])
        return prepared

    num_proc = None if arm == "B1" else len(os.sched_getaffinity(0))
    table = table.map(prepare_row, remove_columns=table.column_names, num_proc=num_proc)
    table = table.filter(lambda input_ids: len(input_ids) < MOST_TOKENS, input_columns=["input_ids"])
    return table if arm == "B1" else table.with_format("numpy")


@dataclass
class PaddingCollator:
    """The documented collator: pads text and spectrograms, marks padded frames with -100, and cuts odd ends.

    The length of the longest row is rounded down to the reduction factor.
    """

    processor: SpeechT5Processor
    reduction_factor: int

    def __call__(self, rows):
        batch = self.processor.pad(
            input_ids=[{"input_ids": row["input_ids"]} for row in rows],
            labels=[{"input_values": row["labels"]} for row in rows],
            return_tensors="pt",
        )
        is_padding = batch.pop("decoder_attention_mask").ne(1)
        labels = batch["labels"].masked_fill(is_padding.unsqueeze(-1), -100)
        longest = max(len(row["labels"]) // self.reduction_factor * self.reduction_factor for row in rows)
        batch["labels"] = labels[:, :longest]
        batch["speaker_embeddings"] = torch.stack(
            [torch.as_tensor(row["speaker_embeddings"], dtype=torch.float32) for row in rows]
        )
        return batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    set_seed(options.seed)
    processor = SpeechT5Processor.from_pretrained(options.model_name_or_path)
    model = SpeechT5ForTextToSpeech.from_pretrained(options.model_name_or_path)
    model.config.use_cache = False  # as documented beside checkpointing
    table = prepare(options.dataset_dir / "train", processor, options.arm)
    cuda = torch.cuda.is_available()
    if options.arm == "B1":
        precision = {"fp16": cuda}
    else:
        is_fast = cuda or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        precision = {"bf16": is_fast, "tf32": cuda or None}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            seed=options.seed,
            use_cpu=not cuda,
            save_strategy="no",
            report_to="none",
            **PUBLISHED,
            **ARMS[options.arm],
            **precision,
        ),
        train_dataset=table,
        data_collator=PaddingCollator(processor, model.config.reduction_factor),
        processing_class=processor,
    )
    trainer.train()


if __name__ == "__main__":
    main()
