"""Teach SpeechT5 your voice by training a small adapter (LoRA) and leaving the model itself alone.

accelerate launch recipes/speecht5_lora/run.py                                  # args.yaml beside this file
accelerate launch recipes/speecht5_lora/run.py recipes/speecht5_lora/demo.yaml   # another arguments file
accelerate launch recipes/speecht5_lora/run.py --learning_rate 5e-4             # flags win over the file
"""

from transformers import set_seed

from hfspeech.arguments import DataArguments, LoraArguments, SpeechT5Arguments, SpeechT5TrainingArguments, parse
from hfspeech.batching import SpeechT5Collator
from hfspeech.data import load_speech
from hfspeech.errors import explain_errors
from hfspeech.inference import Listener
from hfspeech.metrics import SynthesisScore
from hfspeech.models.lora import add_lora
from hfspeech.models.opinion import load_mos_model
from hfspeech.models.speecht5 import load_speecht5
from hfspeech.models.vocoders import load_vocoder
from hfspeech.publish import publish
from hfspeech.runs import open_run
from hfspeech.training.speecht5 import SpeechT5Trainer
from hfspeech.voices import find_voices, load_speaker_encoder


@explain_errors
def main():
    # Arguments: the file beside this one, then whatever the command line changes.
    data_args, model_args, lora_args, train_args = parse(
        __file__, DataArguments, SpeechT5Arguments, LoraArguments, SpeechT5TrainingArguments
    )

    # Run: a new output folder, or the one in which this same run stopped.
    open_run(train_args)
    set_seed(train_args.seed)

    # Model: SpeechT5, frozen, with the adapter on top, and what spells text out for it.
    model, processor, front_end = load_speecht5(model_args)
    model = add_lora(model, lora_args)

    # Data: train, validation and test rows, checked, not yet decoded, and the voice of each.
    speech = load_speech(data_args, processor, train_args.seed, model.config.max_text_positions, front_end)
    encoder = load_speaker_encoder(model_args.speaker_encoder)
    voices = find_voices(speech, model_args, encoder)

    # Judges: a Whisper that writes down what it hears, an ear for voices, and a listener's opinion if asked for.
    listener = Listener(model_args.asr_model_name_or_path, model_args.asr_language or model_args.language)
    opinion = load_mos_model(model_args.mos_model)
    score = SynthesisScore(
        listener, encoder, data_args.group_columns, train_args.normalizer, model_args.language, opinion
    )

    # Trainer: the ordinary Seq2SeqTrainer, plus length bucketing, a loss that is right and a record of the run.
    trainer = SpeechT5Trainer(
        model=model,
        args=train_args,
        train_dataset=speech["train"],
        eval_dataset=speech["validation"],
        data_collator=SpeechT5Collator(processor, front_end, voices, model.config, data_args.on_bad_audio),
        compute_metrics=score,
        processing_class=processor,
        vocoder=load_vocoder(model_args.vocoder),
    )

    # Before: how well the model as it came is understood, and how far from the recordings it is.
    trainer.measure("before", speech)

    # Train: carries on from the last checkpoint if there is one.
    trainer.train_or_resume()

    # After: on the same rows, never trained on, overall and for each group.
    trainer.measure("after", speech)

    # Publish: model, voices, results and a table.
    publish(trainer, speech)


if __name__ == "__main__":
    main()
