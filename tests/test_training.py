"""What `SpeechTrainer` promises besides the right loss: nothing lost on a fault, broken recordings, finished runs."""

import json
import shutil

import pytest
import soundfile
import torch
from conftest import NANO
from transformers import set_seed

from hfspeech.arguments import DataArguments, LoraArguments, SpeechTrainingArguments, WhisperArguments
from hfspeech.augment import augment
from hfspeech.batching import WhisperCollator
from hfspeech.data import load_speech
from hfspeech.errors import UserError
from hfspeech.metrics import TranscriptScore
from hfspeech.models import add_lora, load_whisper
from hfspeech.training import SpeechTrainer, is_whole_checkpoint, last_checkpoint


def make_trainer(data, output_dir, on_bad_audio="error", model_changes=None, speeds=None, **changes):
    settings = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "report_to": ["none"], "eval_steps": 2}
    settings |= {"save_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "normalizer": "basic"}
    args = SpeechTrainingArguments(output_dir=str(output_dir), **{**settings, **changes})
    args.run_arguments = {}
    set_seed(args.seed)
    model_args = WhisperArguments(model_name_or_path=str(NANO), language="english", **(model_changes or {}))
    model, processor = load_whisper(model_args)
    model = add_lora(model, LoraArguments(lora_r=4))
    speech = load_speech(DataArguments(dataset_name=[str(data)], on_bad_audio=on_bad_audio), processor, args.seed)
    speech["train"] = augment(speech["train"], speeds, processor, args.seed)
    trainer = SpeechTrainer(
        model, args, speech["train"], speech["validation"], WhisperCollator(processor, on_bad_audio),
        TranscriptScore(processor, None, args.normalizer), processor,
    )  # fmt: skip
    trainer.speech = speech
    return trainer


@pytest.fixture
def data_with_a_cut_file(few_digits, tmp_path):
    """The digits, one training recording a FLAC that breaks off: its header is whole, so only decoding finds it."""
    folder = tmp_path / "data"
    shutil.copytree(few_digits, folder)
    ogg = sorted((folder / "train").glob("*.ogg"))[3]
    waveform, rate = soundfile.read(ogg)
    flac = ogg.with_suffix(".flac")
    soundfile.write(flac, waveform, rate)
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size // 2])
    ogg.unlink()
    metadata = folder / "train/metadata.csv"
    metadata.write_text(metadata.read_text().replace(ogg.name, flac.name))
    return folder, flac.name


def test_a_broken_recording_is_left_out_and_counted(data_with_a_cut_file, tmp_path):
    data, name = data_with_a_cut_file
    trainer = make_trainer(data, tmp_path / "run", on_bad_audio="skip", max_steps=6)  # 24 rows: one whole pass
    trainer.measure("before", trainer.speech)
    trainer.train_or_resume()
    trainer.measure("after", trainer.speech)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["rows"]["bad_audio"]["train"]["count"] == 1
    assert name in results["rows"]["bad_audio"]["train"]["examples"][0]
    seconds = sum(trainer.train_dataset.column("duration_s"))
    assert 0 < seconds - results["train"]["audio_seconds"] < 5  # all audio but that of one recording


def test_a_broken_recording_stops_the_run_and_loses_nothing(data_with_a_cut_file, tmp_path):
    data, name = data_with_a_cut_file
    trainer = make_trainer(data, tmp_path / "run", max_steps=50, save_steps=50, eval_steps=50)
    with pytest.raises(UserError, match=f"{name}.*--on_bad_audio skip") as caught:
        trainer.train_or_resume()
    step = trainer.state.global_step
    if step:
        assert f"The {step} steps trained so far are saved" in str(caught.value)
        assert last_checkpoint(tmp_path / "run", step)
    # The same run goes on once the recording is left out.
    trainer = make_trainer(data, tmp_path / "run", on_bad_audio="skip", max_steps=50, save_steps=50, eval_steps=50)
    trainer.train_or_resume()
    assert trainer.state.global_step == 50


def test_a_finished_run_trains_no_more(few_digits, tmp_path):
    first = make_trainer(few_digits, tmp_path)
    first.train_or_resume()
    first.measure("after", first.speech)
    again = make_trainer(few_digits, tmp_path, max_steps=4)
    again.train_or_resume()
    assert again.state.global_step == 4
    for (name, one), (_, two) in zip(first.model.named_parameters(), again.model.named_parameters()):
        torch.testing.assert_close(one, two, msg=name)
    assert again.results["train"] == first.results["train"]


def test_a_run_killed_after_its_last_step_trains_no_more(few_digits, tmp_path):
    """Four steps of the six in a pass, and nothing but the checkpoints left: no fifth step, and the same record."""
    first = make_trainer(few_digits, tmp_path)
    first.train_or_resume()
    (tmp_path / "results.json").unlink()
    again = make_trainer(few_digits, tmp_path)
    again.train_or_resume()
    assert again.state.global_step == again.results["train"]["steps"] == 4
    assert not (tmp_path / "checkpoint-5").exists()
    assert again.results["train"]["audio_seconds"] == pytest.approx(first.results["train"]["audio_seconds"])


def test_data_that_changed_stops_the_run(few_digits, tmp_path):
    first = make_trainer(few_digits, tmp_path)
    first.measure("before", first.speech)
    again = make_trainer(few_digits, tmp_path)
    again.speech["test"] = again.speech["test"].select(range(5))
    with pytest.raises(UserError, match="test had 8 rows, now 5"):
        again.measure("before", again.speech)


def test_the_best_checkpoint_by_wer_is_kept(few_digits, tmp_path):
    """A learning rate that wrecks the model: the end is worse than the first checkpoint, which is what is kept."""
    trainer = make_trainer(few_digits, tmp_path, max_steps=12, learning_rate=3.0, lr_scheduler_type="constant")
    trainer.train_or_resume()
    wers = {entry["step"]: entry["eval_wer"] for entry in trainer.state.log_history if "eval_wer" in entry}
    best = trainer.state.best_global_step
    assert best > 0 and wers[best] == min(wer for step, wer in wers.items() if step)
    trainer.evaluate()
    assert trainer.last_evaluation[0]["wer"] == pytest.approx(wers[best])


def test_early_stopping(few_digits, tmp_path):
    trainer = make_trainer(
        few_digits, tmp_path, max_steps=200, learning_rate=1e-12, early_stopping_patience=2, max_grad_norm=1.0
    )
    trainer.train_or_resume()
    assert trainer.state.global_step <= 8


def test_a_loss_that_is_no_number_ends_the_run(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, max_steps=50, eval_steps=50, save_steps=50)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(UserError, match="loss at step 1 is nan: lower --learning_rate"):
        trainer.train_or_resume()


def test_a_stop_during_an_evaluation_saves_first(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, max_steps=10, save_steps=10, eval_steps=5, eval_on_start=False)

    def stop(*args, **kwargs):
        trainer.stop_request.received = True
        return original(*args, **kwargs)

    original, trainer.get_eval_dataloader = trainer.get_eval_dataloader, stop
    with pytest.raises(UserError, match="The 5 steps trained so far are saved") as caught:
        trainer.train_or_resume()
    assert caught.value.exit_code == 130
    assert last_checkpoint(tmp_path, 5)


def test_spec_augment_masks_training_only(few_digits, tmp_path):
    """With SpecAugment two passes over a batch differ in training, and agree in evaluation."""
    changes = {"apply_spec_augment": True, "mask_time_prob": 0.3, "dropout": 0.0}
    trainer = make_trainer(few_digits, tmp_path, model_changes=changes)
    trainer.model.get_base_model().config.dropout = 0.0
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])

    def loss():
        return trainer.compute_loss(trainer.model, batch).item()

    trainer.model.eval()
    assert loss() == loss()
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert loss() != loss()


def test_speed_perturbation_is_drawn_anew_each_epoch(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, speeds=[0.9, 1.1])
    lengths = []
    for epoch in (0, 0, 1):
        trainer.train_dataset.set_epoch(epoch)
        lengths.append([len(trainer.train_dataset[i]["waveform"]) for i in range(8)])
    assert lengths[0] == lengths[1] != lengths[2]


def test_a_checkpoint_counts_only_when_whole(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, max_steps=2)
    trainer.train_or_resume()
    whole = tmp_path / "checkpoint-2"
    assert is_whole_checkpoint(whole)
    for name in ("trainer_state.json", "progress.json", "optimizer.pt", "adapter_model.safetensors"):
        broken = tmp_path / f"without-{name}"
        shutil.copytree(whole, broken)
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        assert not is_whole_checkpoint(broken), name
        (broken / name).unlink()
        assert not is_whole_checkpoint(broken), name


def test_quantised_weights_need_lora(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path)
    model, _ = load_whisper(WhisperArguments(model_name_or_path=str(NANO), language="english"))
    model.quantization_method = "bitsandbytes"  # what transformers sets on a model that it has quantised
    with pytest.raises(UserError, match="use the LoRA recipe"):
        SpeechTrainer(
            model, trainer.args, trainer.train_dataset, trainer.eval_dataset, trainer.data_collator,
            trainer.compute_metrics, trainer.processing_class,
        )  # fmt: skip
