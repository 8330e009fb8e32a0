"""What `WhisperTrainer` promises besides the right loss: nothing lost on a fault, finished runs, a fast path that agrees."""

import json
import shutil
import signal

import numpy as np
import pytest
import soundfile
import torch
from conftest import NANO
from transformers import set_seed

from hfspeech.arguments import DataArguments, LoraArguments, WhisperArguments, WhisperTrainingArguments
from hfspeech.augment import augment
from hfspeech.batching import WhisperCollator
from hfspeech.data import load_speech
from hfspeech.data import rows as data_rows
from hfspeech.errors import UserError
from hfspeech.inference import transcribe
from hfspeech.metrics import TranscriptScore
from hfspeech.modeling.whisper import EncoderOutputs
from hfspeech.models.loading import base_of
from hfspeech.models.lora import add_lora
from hfspeech.models.whisper import load_for_inference, load_whisper
from hfspeech.publish import publish
from hfspeech.runs import last_checkpoint
from hfspeech.training.whisper import WhisperTrainer


def make_trainer(
    data, output_dir, on_bad_audio="error", model_changes=None, speeds=None, lora=True, streaming=False, **changes
):
    settings = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "report_to": ["none"], "eval_steps": 2}
    settings |= {"save_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "normalizer": "basic"}
    settings["encoder_window"] = "auto"
    args = WhisperTrainingArguments(output_dir=str(output_dir), **{**settings, **changes})
    set_seed(args.seed)
    model_args = WhisperArguments(**{"model_name_or_path": str(NANO), "language": "english", **(model_changes or {})})
    model, processor = load_whisper(model_args)
    if lora:
        model = add_lora(model, LoraArguments(lora_r=4))
    data_args = DataArguments(dataset_name=[str(data)], on_bad_audio=on_bad_audio, streaming=streaming)
    args.run_arguments = args.to_dict() | vars(data_args) | vars(model_args)
    speech = load_speech(data_args, processor, args.seed)
    speech["train"] = augment(speech["train"], speeds, processor, args.seed)
    trainer = WhisperTrainer(
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
    # 24 rows: one whole pass
    trainer = make_trainer(data, tmp_path / "run", on_bad_audio="skip", max_steps=6, full_window_share=0.0)
    trainer.measure("before", trainer.speech)
    trainer.train_or_resume()
    trainer.measure("after", trainer.speech)
    results = json.loads((tmp_path / "run/run.json").read_text())
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
    (tmp_path / "run.json").unlink()
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
        trainer.stop_request(signal.SIGINT, None)
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


def test_quantised_weights_need_lora(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path)
    model, _ = load_whisper(WhisperArguments(model_name_or_path=str(NANO), language="english"))
    model.quantization_method = "bitsandbytes"  # what transformers sets on a model that it has quantised
    with pytest.raises(UserError, match="use the LoRA recipe"):
        WhisperTrainer(
            model, trainer.args, trainer.train_dataset, trainer.eval_dataset, trainer.data_collator,
            trainer.compute_metrics, trainer.processing_class,
        )  # fmt: skip


# Batches


def watch_batches(trainer):
    """Returns a list that fills with (rows, padded seconds, frames) of every training batch."""
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        features = inputs.get("input_features")
        frames = None if features is None else features.shape[-1]
        seen.append((inputs["index"], round(inputs["padded_s"], 6), frames))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


QUIET = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}


@pytest.mark.parametrize(
    "changes",
    [{"max_batch_seconds": 12.0}, {"full_window_share": 0.3}, {"max_batch_seconds": 9.0, "full_window_share": 0.25}],
    ids=str,
)
def test_a_resumed_run_draws_what_an_uninterrupted_one_would_have(few_digits, tmp_path, changes):
    settings = {**QUIET, **changes, "max_steps": 16, "save_steps": 7, "save_total_limit": None}
    whole = make_trainer(few_digits, tmp_path / "whole", **settings)
    drawn = watch_batches(whole)
    whole.train_or_resume()
    assert whole.train_sampler.steps_per_epoch < 16  # so that an epoch ends on the way
    shutil.copytree(tmp_path / "whole/checkpoint-7", tmp_path / "run/checkpoint-7")
    resumed = make_trainer(few_digits, tmp_path / "run", **settings)
    drawn_again = watch_batches(resumed)
    resumed.train_or_resume()
    assert drawn_again == drawn[7:] and len(drawn) == 16
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        torch.testing.assert_close(one, two, msg=name)


def test_batches_are_padded_no_further_than_they_need_or_always_to_the_window(few_digits, tmp_path):
    drawn = {}
    for window in ("auto", "full"):
        trainer = make_trainer(
            few_digits, tmp_path / window, **QUIET, max_steps=6, encoder_window=window, full_window_share=0.0
        )
        seen = watch_batches(trainer)
        trainer.train_or_resume()
        drawn[window] = seen
    assert {frames for *_, frames in drawn["full"]} == {250}
    durations_s = trainer.train_dataset.column("duration_s")
    for index, padded_s, frames in drawn["auto"]:
        longest_s = max(durations_s[i] for i in index)
        assert longest_s + 0.2 <= padded_s <= longest_s + 1.0 and frames % 2 == 0
        assert padded_s <= frames * 0.02 + 1e-6 < padded_s + 0.05


def test_slowed_down_recordings_are_planned_for(few_digits, tmp_path):
    """The batches of one step stay equal, and within what they may cost, whatever the speed of their rows."""
    trainer = make_trainer(
        few_digits, tmp_path, **QUIET, speeds=[0.7, 1.0], max_batch_seconds=12.0, gradient_accumulation_steps=2,
        max_steps=6, full_window_share=0.0,
    )  # fmt: skip
    seen = watch_batches(trainer)
    trainer.train_or_resume()
    for (rows, _, frames), (rows_beside, _, frames_beside) in zip(seen[::2], seen[1::2]):
        assert len(rows) == len(rows_beside) and frames == frames_beside
        assert len(rows) * frames * 0.02 <= 12.0 + len(rows) * 0.04 or len(rows) == 1


def test_a_stream_trains_unpadded(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, streaming=True, **QUIET, max_steps=5, full_window_share=0.0)
    seen = watch_batches(trainer)
    trainer.train_or_resume()
    assert trainer.state.global_step == 5 and len(seen) == 5
    assert min(frames for *_, frames in seen) < 250


def test_batches_by_seconds_need_known_lengths(few_digits, tmp_path):
    with pytest.raises(UserError, match="--max_batch_seconds .*give --per_device_train_batch_size instead") as caught:
        make_trainer(few_digits, tmp_path, streaming=True, max_batch_seconds=20.0)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_only_a_gpu_can_be_filled_by_itself(few_digits, tmp_path):
    with pytest.raises(UserError, match="--max_batch_seconds auto needs a GPU .*give a number") as caught:
        make_trainer(few_digits, tmp_path, max_batch_seconds="auto")
    assert "\n" not in str(caught.value)


def ask_for_auto(trainer, room_s):
    """Lets a trainer search for what fits on a device with room for so many seconds in a batch."""
    tried = []

    def try_step(batch, num_rows):
        assert len(batch["index"]) == 1 and num_rows >= 1
        tried.append(num_rows * batch["padded_s"])
        if tried[-1] > room_s:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.args.max_batch_seconds, trainer.max_batch_seconds, trainer._try_step = "auto", None, try_step
    return tried


def test_the_most_seconds_that_fit_are_looked_for_kept_and_told(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr("hfspeech.hardware.gc.collect", lambda: None)  # slow, with the garbage of the other tests
    settings = {**QUIET, "max_steps": 4, "save_steps": 2}
    trainer = make_trainer(few_digits, tmp_path, **settings)
    tried = ask_for_auto(trainer, room_s=40.0)
    seen = watch_batches(trainer)
    trainer.train_or_resume()
    found = trainer.max_batch_seconds
    assert 0.8 * 40 <= found <= 40 and tried
    assert all(len(index) * padded_s <= found for index, padded_s, _ in seen)
    assert any(choice.startswith(f"batches of {found:.0f} s") for choice in trainer.args.choices)
    # A resumed run keeps it, although the memory would look otherwise now.
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "run.json").unlink()
    again = make_trainer(few_digits, tmp_path, **settings)
    tried = ask_for_auto(again, room_s=20.0)
    again.train_or_resume()
    assert again.max_batch_seconds == found and not tried


def test_no_room_for_a_single_row_is_one_sentence(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, **QUIET)
    ask_for_auto(trainer, room_s=0.5)
    with pytest.raises(UserError, match="no room for a single row"):
        trainer.choose_max_batch_seconds()


def test_a_tried_step_changes_nothing(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, **QUIET, model_changes={"apply_spec_augment": True, "dropout": 0.1})
    batch = trainer.data_collator([trainer.train_dataset[0, 3.0]])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    trainer._try_step(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


# A frozen encoder


FROZEN = {"freeze_encoder": True}


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_encoder_is_run_once_for_each_row(few_digits, tmp_path, monkeypatch, lora):
    """In later passes over a row its audio is not even decoded."""
    trainer = make_trainer(
        few_digits, tmp_path, **QUIET, max_steps=40, full_window_share=0.0, model_changes=FROZEN, lora=lora
    )
    audio, encoded = [], []
    decoder = data_rows.decode
    monkeypatch.setattr(data_rows, "decode", lambda *args, **kwargs: audio.append(1) or decoder(*args, **kwargs))
    encoder = base_of(trainer.model).model.encoder
    encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    anew, original = {}, trainer.compute_loss  # epoch → rows that are encoded in it

    def compute_loss(model, inputs, *args, **kwargs):
        rows = [row for row, known in zip(inputs["index"], inputs["is_encoded"]) if not known]
        anew.setdefault(int(trainer.state.epoch), []).extend(rows)
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train_or_resume()
    assert len(anew) >= 3 and anew[0]
    rows = [row for rows in anew.values() for row in set(rows)]
    assert len(rows) == len(set(rows)), "a row is encoded in one epoch only"
    assert len(audio) == sum(encoded) == sum(map(len, anew.values()))
    assert len(trainer.encoder_outputs.keys()) == len(rows)


def test_what_is_remembered_is_learnt_from_alike(few_digits, tmp_path):
    """The same run with and without room to remember: the same losses, whose batches are the same."""
    curves = []
    for room in (0, 10**9):
        trainer = make_trainer(
            few_digits, tmp_path / str(room), **QUIET, max_steps=24, full_window_share=0.2, model_changes=FROZEN,
            lora=False,
        )  # fmt: skip
        trainer.encoder_outputs = EncoderOutputs(room)
        seen = watch_batches(trainer)
        trainer.train_or_resume()
        curves.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seen))
    (plain, drawn), (remembered, drawn_again) = curves
    assert [batch[:2] for batch in drawn] == [batch[:2] for batch in drawn_again] and drawn != drawn_again
    np.testing.assert_allclose(remembered, plain, rtol=1e-3)


def test_the_loss_of_a_batch_is_the_same_encoded_anew_or_remembered(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, **QUIET, model_changes=FROZEN, lora=False)
    trainer.model.eval()
    keys = [(i, 4.0) for i in range(5)]

    def loss(keys):
        batch = trainer.data_collator([trainer.train_dataset[key] for key in keys])
        return trainer.compute_loss(trainer.model, batch).item(), batch["is_encoded"]

    new, new_again = loss(keys[:3]), loss(keys)
    trainer.train_dataset.skip_audio_of(trainer.encoder_outputs.keys() - {keys[1]})
    mixed = loss(keys[:3])
    trainer.train_dataset.skip_audio_of(trainer.encoder_outputs.keys())
    remembered = loss(keys[:3])
    assert (new[1], mixed[1], remembered[1]) == ([False] * 3, [True, False, True], [True] * 3)
    assert mixed[0] == pytest.approx(new[0], rel=1e-5) and remembered[0] == pytest.approx(new[0], rel=1e-5)
    trainer.encoder_outputs = None
    trainer.train_dataset.skip_audio_of(frozenset())
    assert loss(keys)[0] == pytest.approx(new_again[0], rel=1e-5)


@pytest.mark.parametrize(
    "is_on, changes",
    [
        (True, {"model_changes": FROZEN}),
        (False, {"model_changes": FROZEN, "cache_encoder_outputs": False}),
        (False, {}),
        (False, {"lora": False}),
        (False, {"model_changes": FROZEN, "speeds": [0.9, 1.1]}),
        (False, {"model_changes": {**FROZEN, "apply_spec_augment": True}}),
        (False, {"model_changes": {**FROZEN, "dropout": 0.1}}),
        (False, {"model_changes": FROZEN, "streaming": True}),
    ],
    ids=str,
)
def test_outputs_are_remembered_only_where_nothing_changes_them(few_digits, tmp_path, is_on, changes):
    trainer = make_trainer(few_digits, tmp_path, **changes)
    assert (trainer.encoder_outputs is not None) is is_on
    assert any(choice.startswith("the encoder runs once") for choice in trainer.args.choices) is is_on


def test_a_recording_longer_than_its_row_says_can_be_remembered_too(few_digits, tmp_path):
    """Lengths that a table gives are not measured: one that is too short makes the batch longer than was planned."""
    trainer = make_trainer(few_digits, tmp_path, **QUIET, model_changes=FROZEN, lora=False)
    durations_s = trainer.train_dataset.column("duration_s")
    order = sorted(range(len(durations_s)), key=lambda i: durations_s[i])
    (first, second), longest = [(i, 2.0) for i in order[:2]], (order[-1], 2.0)

    def loss(*keys):
        return trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[key] for key in keys]))

    loss(first, longest), loss(second)
    trainer.train_dataset.skip_audio_of(trainer.encoder_outputs.keys())
    assert loss(first, second).isfinite() and loss(second, longest).isfinite()


# Evaluation


def test_a_model_tuned_unpadded_is_measured_both_ways(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path / "auto", **QUIET)
    trainer.train_or_resume()
    frames = []
    encoder = base_of(trainer.model).model.encoder
    encoder.register_forward_hook(lambda module, inputs, output: frames.append(inputs[0].shape[-1]))
    trainer.measure("after", trainer.speech)
    after = json.loads((tmp_path / "auto/run.json").read_text())["after"]
    assert frames[0] == 250 and 0 < frames[-1] < 250
    assert after["rows"] == after["unpadded"]["rows"] == 8
    assert {"wer", "wer_low", "wer_high", "loss", "unfinished"} <= after["unpadded"].keys()
    rows = [json.loads(line) for line in (tmp_path / "auto/predictions.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(8))

    trainer = make_trainer(few_digits, tmp_path / "full", **QUIET, encoder_window="full", max_steps=1)
    trainer.train_or_resume()
    trainer.measure("after", trainer.speech)
    assert "unpadded" not in trainer.results["after"] and trainer.results["after"]["rows"] == 8


def test_a_kernel_that_cannot_weigh_silence_is_refused(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, lora=False)
    trainer.model.config._attn_implementation = "flash_attention_2"  # which loads only where there is a GPU for it
    given = (trainer.model, trainer.args, trainer.train_dataset, trainer.eval_dataset, trainer.data_collator, None)
    with pytest.raises(UserError, match="only sdpa and eager can"):
        WhisperTrainer(*given, trainer.processing_class)
    trainer.args.encoder_window = "full"
    WhisperTrainer(*given, trainer.processing_class)


def test_before_its_first_step_a_model_is_given_the_full_window(few_digits, tmp_path):
    rows_alone = {"per_device_eval_batch_size": 1}
    trainer = make_trainer(few_digits, tmp_path, max_steps=2, eval_steps=1, save_steps=2, **rows_alone)
    frames = []
    encoder = base_of(trainer.model).model.encoder
    encoder.register_forward_hook(lambda m, inputs, out: None if m.training else frames.append(inputs[0].shape[-1]))
    trainer.measure("before", trainer.speech)
    assert set(frames) == {250} and "unpadded" not in trainer.results["before"]
    frames.clear()
    trainer.train_or_resume()
    assert frames[0] == 250 and frames[-1] < 250


def test_rows_cut_off_at_the_bound_are_counted(few_digits, tmp_path):
    counts = {}
    for bound in (None, 2):
        trainer = make_trainer(few_digits, tmp_path / str(bound), **QUIET, generation_max_length=bound)
        trainer.evaluate(trainer.speech["test"])
        counts[bound] = trainer.last_evaluation[0]["unfinished"]
    assert counts == {None: 0, 2: 8}


def test_without_an_evaluation_at_the_start_there_is_no_before(few_digits, tmp_path, capsys):
    """And the table at the end does without it."""
    trainer = make_trainer(few_digits, tmp_path, **QUIET, max_steps=1)
    trainer.compute_metrics = TranscriptScore(trainer.processing_class, ["speaker"], "basic")
    trainer.measure("before", trainer.speech)
    assert "before" not in trainer.results
    trainer.train_or_resume()
    trainer.measure("after", trainer.speech)
    publish(trainer, trainer.speech)
    results = json.loads((tmp_path / "run.json").read_text())
    assert "before" not in results and results["after"]["groups"]["speaker"]
    assert f"{100 * results['after']['wer']:.1f} %" in capsys.readouterr().out


def test_a_static_cache_writes_the_same(few_digits, tmp_path):
    found = []
    for cache in ("dynamic", "static"):
        trainer = make_trainer(
            few_digits, tmp_path / cache, **QUIET, generation_cache_implementation=cache, per_device_eval_batch_size=2
        )
        trainer.measured_window = "auto"  # batches of several lengths
        trainer.evaluate(trainer.speech["test"])
        found.append([row["prediction"] for row in trainer.last_evaluation[1]])
    assert found[0] == found[1] and any(found[0])


def test_a_tuned_model_says_how_it_wants_to_be_heard(few_digits, tmp_path):
    frames = {}
    for window in ("auto", "full"):
        out = tmp_path / window
        trainer = make_trainer(few_digits, out, **QUIET, encoder_window=window, max_steps=1, lora=False)
        trainer.train_or_resume()
        publish(trainer, trainer.speech)
        model, processor = load_for_inference(out)
        seen = []
        model.model.encoder.register_forward_hook(lambda m, inputs, out, seen=seen: seen.append(inputs[0].shape[-1]))
        for asked in (None, "full", "auto"):
            list(transcribe(model, processor, [trainer.speech["test"][0]["waveform"]], encoder_window=asked))
            frames[window, asked] = seen[-1]
    assert frames["auto", "full"] == frames["full", "full"] == frames["full", None] == 250
    assert frames["auto", None] == frames["auto", "auto"] == frames["full", "auto"] < 250


def test_a_model_tuned_at_the_full_window_again_says_so(few_digits, tmp_path):
    model = shutil.copytree(NANO, tmp_path / "model")
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "encoder_window": "auto"}))
    changes = {"model_name_or_path": str(model)}
    trainer = make_trainer(few_digits, tmp_path / "run", encoder_window="full", lora=False, model_changes=changes)
    assert getattr(trainer.model.generation_config, "encoder_window", "full") == "full"


# Precision and compilation


def test_the_precision_of_a_cpu_depends_on_the_model(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path / "fp32", **QUIET)
    assert not trainer.args.bf16 and trainer.accelerator.mixed_precision == "no"
    assert sum(choice.startswith("fp32: no GPU") for choice in trainer.args.choices) == 1


def test_bf16_on_a_cpu_trains_and_measures(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hfspeech.training.trainer.can_train_in_bf16", lambda d_model: (True, "bf16: the test says so")
    )
    trainer = make_trainer(
        few_digits, tmp_path, **QUIET, max_steps=30, model_changes=FROZEN, lora=False, full_window_share=0.0
    )
    assert trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16"
    assert "bf16: the test says so" in trainer.args.choices
    inside = []
    layer = trainer.model.model.decoder.layers[0].fc1
    layer.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    trainer.train_or_resume()
    assert set(inside) == {torch.bfloat16}
    assert {output.dtype for output in trainer.encoder_outputs.outputs.values()} == {torch.bfloat16}
    assert trainer.model.dtype == torch.float32
    trainer.evaluate(trainer.speech["test"])
    assert 0 <= trainer.last_evaluation[0]["wer"] < 1


def test_a_given_precision_is_kept(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr("hfspeech.training.trainer.can_train_in_bf16", lambda d_model: (True, "bf16: not asked"))
    trainer = make_trainer(few_digits, tmp_path, bf16=False, fp16=False)
    assert not trainer.args.bf16 and "bf16: not asked" not in trainer.args.choices


def test_what_is_compiled_meets_few_shapes(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path, **QUIET, torch_compile=True, torch_compile_backend="eager")
    loader, shapes = trainer.get_train_dataloader(), set()
    for epoch in range(10):
        trainer.train_sampler.set_epoch(epoch)
        shapes |= {(batch["input_features"].shape[-1], batch["labels"].shape[-1]) for batch in loader}
    lengths, labels = zip(*shapes)
    assert 3 < len(set(lengths)) <= 16
    assert set(labels) == {16}  # the digits' labels have 5 to 10 tokens


def test_compiled_training_is_training(few_digits, tmp_path):
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        settings |= {"max_steps": 2, "full_window_share": 1.0, "model_changes": FROZEN, "lora": False}
        trainer = make_trainer(
            few_digits, tmp_path / str(len(losses)), **QUIET, cache_encoder_outputs=False, **settings
        )
        trainer.train_or_resume()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch._dynamo.reset()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_run_does_not_go_on_with_other_rows(few_digits, tmp_path):
    trainer = make_trainer(few_digits, tmp_path)
    trainer.write_record(trainer.speech)
    trainer.measure("after", trainer.speech)
    trainer.speech.account["splits"]["train"]["fingerprint"] = "sha256:other"  # as many, and still not the same
    with pytest.raises(UserError, match="other rows in train.*--output_dir"):
        trainer.measure("after", trainer.speech)


def test_a_run_stopped_before_its_first_checkpoint_learns_the_same_bits(few_digits, tmp_path):
    """Its `before` is known already, and drawing nothing for it would change every mask that is drawn later."""
    for name in ("whole", "stopped"):
        trainer = make_trainer(few_digits, tmp_path / name, model_changes={"apply_spec_augment": True})
        trainer.measure("before", trainer.speech)
        if name == "stopped":
            trainer = make_trainer(few_digits, tmp_path / name, model_changes={"apply_spec_augment": True})
            trainer.measure("before", trainer.speech)
        trainer.train_or_resume()
        trainer.save_model()
    whole, stopped = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
