"""Teach Whisper your recordings by training all of its weights.

accelerate launch recipes/whisper_full/run.py                                  # args.yaml beside this file
accelerate launch recipes/whisper_full/run.py recipes/whisper_full/demo.yaml   # another arguments file
accelerate launch recipes/whisper_full/run.py --learning_rate 1e-5             # flags win over the file
"""

from transformers import set_seed

from hfspeech.arguments import DataArguments, WhisperArguments, WhisperTrainingArguments, parse
from hfspeech.augment import augment
from hfspeech.batching import WhisperCollator
from hfspeech.data import load_speech
from hfspeech.errors import explain_errors
from hfspeech.metrics import TranscriptScore
from hfspeech.models.whisper import load_whisper
from hfspeech.publish import publish
from hfspeech.runs import open_run
from hfspeech.training.whisper import WhisperTrainer


@explain_errors
def main():
    # Arguments: the file beside this one, then whatever the command line changes.
    data_args, model_args, train_args = parse(__file__, DataArguments, WhisperArguments, WhisperTrainingArguments)

    # Run: a new output folder, or the one in which this same run stopped.
    open_run(train_args)
    set_seed(train_args.seed)

    # Model: Whisper, all of it (or with a frozen encoder).
    model, processor = load_whisper(model_args)

    # Data: train, validation and test rows, checked, not yet decoded; only training rows are ever changed.
    speech = load_speech(data_args, processor, train_args.seed, model.config.max_target_positions)
    speech["train"] = augment(speech["train"], data_args.speed_perturbation, processor, train_args.seed)

    # Trainer: the ordinary Seq2SeqTrainer, plus length bucketing, a loss that is right and a record of the run.
    trainer = WhisperTrainer(
        model=model,
        args=train_args,
        train_dataset=speech["train"],
        eval_dataset=speech["validation"],
        data_collator=WhisperCollator(processor, data_args.on_bad_audio),
        compute_metrics=TranscriptScore(processor, data_args.group_columns, train_args.normalizer),
        processing_class=processor,
    )

    # Before: the error rate of the model as it came, padded to its whole window, as stock inference does.
    trainer.measure("before", speech)

    # Train: carries on from the last checkpoint if there is one.
    trainer.train_or_resume()

    # After: on the same rows, never trained on, overall and for each group.
    trainer.measure("after", speech)

    # Publish: model, results and a table.
    publish(trainer, speech)


if __name__ == "__main__":
    main()
