"""Asks whether a nano HiFi-GAN, trained here and now, makes better sound of true spectrograms than Griffin-Lim does.

    python assets/flite_digits/make.py --output_dir outputs/flite_voices --clean --voices rms awb kal16 --num_train 900 --num_test 150
    python bench/vocoders.py --train_on outputs/flite_voices --test_on outputs/flite_voices assets/flite_voice

The generator is a stock `SpeechT5HifiGan` of 0.4 million parameters, trained by spectral losses alone, without a
discriminator, on recordings at several speeds, so that it hears other pitches than its voices'. Test strings stand in no
training set, and the second test set's voice is new to it. One thread; half an hour in all.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this folder last: its evaluate.py is not the package of that name

import numpy as np
import torch
from recogniser import DigitRecogniser
from torch.nn import functional
from torchaudio.functional import resample
from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

from hfspeech.arguments import DataArguments
from hfspeech.audio import log_mel_spectrogram
from hfspeech.data import load_split
from hfspeech.metrics import score
from hfspeech.metrics.synthesis import mel_cepstral_distortion
from hfspeech.models.vocoders import HOP_LENGTH, SAMPLING_RATE, load_vocoder
from hfspeech.runs import environment, write_json

RECORD = Path(__file__).parent / "results/vocoders.json"
SPEEDS_HZ = (16000, 20000, 24000, 30000)  # recordings played as if they had been made at these rates
FRAMES, BATCH, LEARNING_RATE = 32, 8, 2e-3
RESOLUTIONS = (256, 512, 1024)  # FFT lengths; a quarter between frames
CONFIG = {
    "upsample_initial_channel": 128,
    "upsample_rates": [8, 8, 4],
    "upsample_kernel_sizes": [16, 16, 8],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}


def read_split(folder, split):
    """Returns (waveform, text, speaker) of each row."""
    dataset = load_split(DataArguments(dataset_name=[folder]), split)
    rows = [dataset[index] for index in range(len(dataset))]
    speakers, texts = dataset.column("speaker"), dataset.column("text")
    return [(row["waveform"], text, speaker) for row, text, speaker in zip(rows, texts, speakers)]


class SpectralLoss:
    """How far sound is from sound, its phases apart: L1 of log magnitudes at three resolutions, and of log mel."""

    def __init__(self, extractor):
        self.mel_filters = torch.as_tensor(extractor.mel_filters).float()

    def __call__(self, found, true):
        loss = 0
        for fft_length in RESOLUTIONS:
            a, b = (self._magnitudes(sound, fft_length) for sound in (found, true))
            loss = loss + functional.l1_loss(a.log(), b.log()) + (a - b).norm() / b.norm()
        a, b = (self.mel_filters.T @ magnitudes for magnitudes in (a, b))  # of the last resolution, SpeechT5's own
        return loss + 5 * functional.l1_loss(a.clamp(min=1e-5).log(), b.clamp(min=1e-5).log())

    @staticmethod
    def _magnitudes(sound, fft_length):
        window = torch.hann_window(fft_length)
        spectrum = torch.stft(sound, fft_length, fft_length // 4, window=window, return_complex=True)
        return (spectrum.real**2 + spectrum.imag**2).clamp(min=1e-8).sqrt()


def train(folder, steps, extractor):
    """Returns a generator trained on the training split of a folder, and what that took."""
    start = time.process_time()
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sounds, spectrograms = [], []
    for waveform, _, _ in read_split(folder, "train"):
        sound = resample(torch.as_tensor(waveform), int(rng.choice(SPEEDS_HZ)), SAMPLING_RATE)
        if len(sound) > FRAMES * HOP_LENGTH:
            spectrograms.append(log_mel_spectrogram(sound, extractor))
            sounds.append(functional.pad(sound, (0, HOP_LENGTH)))
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**CONFIG)).train()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as torch starts them: SpeechT5HifiGan's own, for weight norm, are nearly silent
    together = torch.cat(spectrograms)
    model.mean.copy_(together.mean(dim=0))
    model.scale.copy_(together.std(dim=0))
    loss_of = SpectralLoss(extractor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    losses = []
    for step in range(1, steps + 1):
        mels, true = [], []
        for row in rng.integers(len(sounds), size=BATCH):
            first = rng.integers(len(spectrograms[row]) - FRAMES)
            mels.append(spectrograms[row][first : first + FRAMES])
            true.append(sounds[row][first * HOP_LENGTH : (first + FRAMES) * HOP_LENGTH])
        loss = loss_of(model(torch.stack(mels)), torch.stack(true))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: loss {np.mean(losses[-100:]):.3f}, {time.process_time() - start:.0f} s", flush=True)
    facts = {
        "dataset": folder,
        "rows": len(sounds),
        "steps": steps,
        "batch": BATCH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": time.process_time() - start,
        "loss": {"first_100": float(np.mean(losses[:100])), "last_100": float(np.mean(losses[-100:]))},
    }
    return model, facts


def compare(name, vocoder, rows, extractor, hear):
    """Turns the true spectrograms of rows into sound and returns what is heard in it and how far it is from them."""
    spectrograms = [log_mel_spectrogram(waveform, extractor) for waveform, _, _ in rows]
    start = time.process_time()
    sounds = [vocoder([spectrogram])[0] for spectrogram in spectrograms]
    seconds = time.process_time() - start
    texts, speakers = [text for _, text, _ in rows], [speaker for _, _, speaker in rows]
    heard = score(hear(sounds), texts, speakers=speakers, normalizer="basic")
    mcd = [mel_cepstral_distortion(sound, row[0]) for sound, row in zip(sounds, rows)]
    again = [log_mel_spectrogram(sound, extractor)[: len(true)] for sound, true in zip(sounds, spectrograms)]
    distance = [(a - b).clamp(-4, 4).abs().mean().item() for a, b in zip(again, spectrograms)]
    print(
        f"{name}: WER {heard['wer']:.4f}, MCD {np.mean(mcd):.3f} dB, log mel {np.mean(distance):.4f}, {seconds:.1f} s"
    )
    return {
        **{key: heard[key] for key in ("rows", "words", "wer", "wer_low", "wer_high", "interval")},
        "mcd": mean_of(mcd),
        "log_mel_distance": mean_of(distance),
        "cpu_seconds_per_second": seconds / sum(len(sound) / SAMPLING_RATE for sound in sounds),
    }


def mean_of(values):
    """Returns the mean of rows' values and the standard error of that mean."""
    return {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / len(values) ** 0.5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_on", required=True, help="folder of clean recordings")
    parser.add_argument("--test_on", nargs="+", required=True, help="folders whose test rows are vocoded")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--output_dir", default="outputs/nano_hifigan", help="where the generator is written")
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args()
    torch.set_num_threads(1)

    made, extractor, hear = environment(), SpeechT5FeatureExtractor(), DigitRecogniser()
    model, trained = train(args.train_on, args.steps, extractor)
    model.save_pretrained(args.output_dir)
    tests = {}
    for folder in args.test_on:
        rows = read_split(folder, "test")
        recordings = score(hear([row[0] for row in rows]), [row[1] for row in rows], normalizer="basic")
        tests[folder] = {"recordings": {"wer": recordings["wer"]}}
        for name in ("griffin_lim", args.output_dir):
            label = "griffin_lim" if name == "griffin_lim" else "nano_hifigan"
            tests[folder][label] = compare(f"{folder}, {label}", load_vocoder(name), rows, extractor, hear)
    write_json(args.output, {"environment": made, "training": trained, "tests": tests})


if __name__ == "__main__":
    main()
