"""`SpeechT5Trainer`: fine-tunes a SpeechT5, and lets others listen to it."""

import hashlib
import logging
from pathlib import Path

import torch

from hfspeech import audio
from hfspeech.batching import LongestFirstSampler
from hfspeech.modeling.speech_generation import generate_spectrograms
from hfspeech.models.loading import base_of, identify
from hfspeech.models.speecht5 import save_synthesis
from hfspeech.runs import SAMPLES_FOLDER
from hfspeech.training.trainer import SpeechTrainer

TOLD_SILENCE_S = 0.3  # silence at the ends of a recording that is worth a word
SAMPLES = 4  # test rows that can be listened to, before and after

logger = logging.getLogger("hfspeech")


class SpeechT5Trainer(SpeechTrainer):
    """Fine-tunes a SpeechT5 to speak; see `SpeechTrainer`, to which it adds:

    - the loss is summed over frames, so that accumulation and processes change nothing, and its parts are logged;
    - evaluation lets the model speak each row's text in the row's voice, and hands what it said to `compute_metrics`;
    - `measure` writes the first test rows as sound, with a picture of the spectrogram and the attention.

    Args:
        model: `SpeechT5ForTextToSpeech`, or a `PeftModel` of one.
        args: `SpeechT5TrainingArguments`.
        train_dataset, eval_dataset: as `load_speech` returns them.
        data_collator: `SpeechT5Collator`.
        compute_metrics: `SynthesisScore`, or another callable from rows with `text`, `waveform`, `reference`, `vocoded` and
            `is_unfinished`.
        processing_class: `SpeechT5Processor`.
        vocoder: what `load_vocoder` returns.
    """

    may_be_sharded = False  # the postnet's running statistics would be those of one process
    logged = ("loss", "l1", "stop_loss", "guided", "wer", "cer", "mcd", "speaker_similarity", "mos")

    def __init__(
        self, model, args, train_dataset, eval_dataset, data_collator, compute_metrics, processing_class, vocoder
    ):
        super().__init__(model, args, train_dataset, eval_dataset, data_collator, compute_metrics, processing_class)
        self.vocoder = vocoder
        self.targets_per_item = processing_class.feature_extractor.num_mel_bins  # a label for each band of a frame
        self._parts, self._frames = {}, 0
        self._vocoded = {}
        self._told_of_silence = False

    # Loss

    def summed_loss(self, model, inputs):
        """Returns L1, stop and guided attention loss, summed over a batch's frames."""
        outputs = model(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "speaker_embeddings", "labels")}
        )
        for name, part in outputs.loss_parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.sum()
        self._frames = self._frames + inputs["labels"][..., 0].ne(-100).sum()
        return outputs.loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self._parts:
            frames = max(int(self._frames), 1)
            logs = {**logs, **{_name(part): round(float(total) / frames, 4) for part, total in self._parts.items()}}
            self._parts, self._frames = {}, 0
        super().log(logs, start_time)

    def _account(self, batch):
        super()._account(batch)
        cut_s, count = sum(batch["trimmed_s"]), len(batch["trimmed_s"])
        if not self._told_of_silence and cut_s > TOLD_SILENCE_S * count:
            self._told_of_silence = True
            logger.warning(
                "Silence at the ends of the recordings is cut off, %.1f s of %.1f s on average: the model would learn to "
                "fall silent instead of stopping", cut_s / count, sum(batch["duration_s"]) / count,
            )  # fmt: skip

    # Batches

    def train_batch_sampler(self, dataset):
        longest_s = max(dataset.column("duration_s"))
        # A batch is as long as its longest row: there is no window to fill, and no tail of silence to learn.
        return super().train_batch_sampler(dataset, window_s=longest_s, encoder_window="auto", tail_s=(0.0, 0.0))

    def eval_batch_sampler(self, dataset):
        durations_s = dataset.column("duration_s")
        return LongestFirstSampler(durations_s, max(durations_s), self.args.eval_batch_size)

    # Evaluation

    def measure_batch(self, model, batch):
        speecht5, device = base_of(model), self.args.device
        names = ("input_ids", "attention_mask", "speaker_embeddings", "labels")
        inputs = {name: batch[name].to(device) for name in names}
        with torch.random.fork_rng():  # the decoder's dropout stays on: the same draws in each evaluation
            torch.manual_seed(self.args.seed)
            parts = speecht5(**inputs).loss_parts
        labels = [row[row[:, 0] != -100] for row in batch["labels"].cpu()]
        with torch.autocast(device.type, enabled=False):  # every frame is made of those before: no rounding between
            spoken = self.speak(speecht5, batch)
            waveforms = self.vocoder([one.spectrogram for one in spoken])
            vocoded = self._through(labels)
        rows = [
            {"waveform": waveform, "reference": reference, "vocoded": true, "is_unfinished": one.is_unfinished}
            for waveform, reference, true, one in zip(waveforms, batch["waveforms"], vocoded, spoken)
        ]
        losses = {_name(part): values.tolist() for part, values in parts.items()}
        losses["loss"] = [sum(values) for values in zip(*losses.values())]
        return rows, [dict(zip(losses, values)) for values in zip(*losses.values())], [len(row) for row in labels]

    def speak(self, speecht5, batch, **options):
        """Returns what a model says to the texts of a batch, each row by dropout masks of its own; see `Generated`."""
        inputs = [batch[name].to(self.args.device) for name in ("input_ids", "attention_mask", "speaker_embeddings")]
        seeds = [self.args.seed + index for index in batch["index"]]
        return generate_spectrograms(speecht5, *inputs, seeds=seeds, **options)

    def _through(self, labels):
        """Returns the true spectrograms through the vocoder; each is vocoded once in a run."""
        keys = [hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest() for row in labels]
        new = [place for place, key in enumerate(keys) if key not in self._vocoded]
        if new:
            self._vocoded |= zip([keys[place] for place in new], self.vocoder([labels[place] for place in new]))
        return [self._vocoded[key] for key in keys]

    def measure_further(self, when, split, dataset, score):
        """Writes the first test rows as the model says them, and what it looked at."""
        if split != "test" or not self.args.should_save:
            return
        rows = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
        batch = self.data_collator(rows)
        if not batch["index"]:
            return
        model = base_of(self.accelerator.unwrap_model(self.model).eval())
        spoken = self.speak(model, batch, output_attentions=True)
        folder = Path(self.args.output_dir) / SAMPLES_FOLDER
        texts = [rows[[row["index"] for row in rows].index(index)]["text"] for index in batch["index"]]
        for number, waveform in enumerate(self.vocoder([one.spectrogram for one in spoken])):
            audio.write(folder / f"{number}_{when}.wav", waveform)
            audio.write(folder / f"{number}_recording.wav", batch["waveforms"][number])
        tokenizer = self.processing_class.tokenizer
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0][batch["attention_mask"][0] == 1])
        draw_speech(folder / f"0_{when}.png", spoken[0], tokens, f"{texts[0]}, {when} training")

    def other_models(self):
        judges = {"speaker_encoder": "embed", "asr_model": "recognise", "mos_model": "rate"}
        models = {role: getattr(self.compute_metrics, name, None) for role, name in judges.items()}
        return {
            role: identify(model.name, commit=model.hub_commit)
            for role, model in {"vocoder": self.vocoder, **models}.items()
            if hasattr(model, "hub_commit")
        }

    def save_beside(self, folder):
        """Writes what it takes to speak with the model, besides its weights."""
        save_synthesis(folder, self.args.run_arguments, self.data_collator.voices.speakers)


def _name(part):
    """Names a part of the loss: `stop` is also a share of the rows, in the score of an evaluation."""
    return "stop_loss" if part == "stop" else part


def draw_speech(path, spoken, tokens, title):
    """Draws a spectrogram above the attention that led to it, mean over layers and heads, as a PNG.

    Args:
        path: of the picture.
        spoken: `Generated`, with its `cross_attentions`.
        tokens: list of str, the tokens of the text.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    spectrogram = spoken.spectrogram.float().cpu().numpy()
    attention = spoken.cross_attentions.float().mean(dim=(0, 1)).cpu().numpy()
    seconds = len(spectrogram) * 0.016
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    upper.imshow(spectrogram.T, origin="lower", aspect="auto", extent=(0, seconds, 0, spectrogram.shape[1]), vmin=-4)
    upper.set(ylabel="mel band")
    upper.set_title(title, parse_math=False)  # a text may hold dollars
    lower.imshow(
        attention.T, origin="lower", aspect="auto", extent=(0, seconds, -0.5, len(tokens) - 0.5), cmap="Blues"
    )
    lower.set(xlabel="seconds", ylabel="attention on the text")
    if len(tokens) <= 60:
        lower.set_yticks(range(len(tokens)), tokens, fontsize=6, parse_math=False)
    figure.savefig(path, dpi=110)
