"""What a run leaves behind: the model, its record and its card, and a table that says what changed."""

from pathlib import Path

from hfspeech.models.loading import base_of
from hfspeech.publish.push import push_at_end
from hfspeech.publish.tables import (
    example_lines,
    figure_text,
    percent,
    rate_text,
    result_table,
    speech_measures,
    where_it_lies,
)
from hfspeech.runs import replacing_files, writing

__all__ = ["figure_text", "percent", "publish", "rate_text", "speech_measures"]


def publish(trainer, speech):
    """Saves model, processor, record and card into the output folder, prints the result, and pushes if that is asked.

    Args:
        trainer: `SpeechTrainer` after `train_or_resume` and `measure`.
        speech: what `load_speech` returned.

    Raises:
        UserError: the folder cannot be written any more; `run.json` has then been written already.
    """
    # Not at the top: a Whisper is trained without SpeechT5's code.
    from hfspeech.publish.card import write_card
    from hfspeech.publish.package import weights_digests
    from hfspeech.publish.privacy import public_record

    output_dir = Path(trainer.args.output_dir)
    trainer.write_record(speech)
    with writing(output_dir), replacing_files(output_dir, trainer.args.should_save) as folder:
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            base_of(trainer.model).generation_config.save_pretrained(folder)
            trainer.save_beside(folder)
    if trainer.is_world_process_zero():
        trainer.results["weights"] = weights_digests(output_dir)
    trainer.finish_record()
    if trainer.is_world_process_zero():
        if "after" in trainer.results:
            write_card(output_dir, public_record(trainer.results))
        print(result_table(trainer.results))
        print(example_lines(trainer.predictions.values()))
        print(where_it_lies(trainer))
        if trainer.args.push_to_hub:
            push_at_end(trainer.args)
