"""Changes to training rows that make a model sturdier; never applied to rows that are measured on."""

import numpy as np
import torch
import torchaudio

from .audio import SAMPLING_RATE


def augment(dataset, speeds, processor, seed=42):
    """Plays each training row at a speed drawn at random, which moves tempo and pitch together, as tape does.

    Args:
        dataset: training rows as `load_speech` returns them, a `SpeechDataset` or a `SpeechStream`.
        speeds: list of float such as [0.9, 1.0, 1.1] (Ko et al. 2015, "Audio augmentation for speech recognition"),
            or None for no change.
        processor: the model's processor; a row that would outgrow its window keeps its speed.
        seed: the speed of a row depends on it, the row and the epoch only, so that a resumed run draws the same ones.

    Returns:
        The dataset with the change in place.
    """
    if not speeds:
        return dataset
    dataset.transforms.append(SpeedPerturbation(speeds, seed, processor.feature_extractor.chunk_length))
    return dataset


class SpeedPerturbation:
    """Resamples a row's waveform so that it lasts `duration_s / speed`; see `augment`.

    Attributes:
        stretch: how many times as long a row may become.
    """

    def __init__(self, speeds, seed, max_duration_s):
        self.speeds, self.seed, self.max_duration_s = speeds, seed, max_duration_s
        self.stretch = 1 / min(speeds)

    def __call__(self, row):
        place = (self.seed, row.get("epoch", 0), row.get("index", row["row"]))
        speed = float(np.random.default_rng(place).choice(self.speeds))
        if row["waveform"] is None or speed == 1.0 or row["duration_s"] / speed > self.max_duration_s:
            return row
        waveform = torch.as_tensor(np.asarray(row["waveform"], dtype=np.float32))
        # Heard at the old rate, speech resampled to rate / speed is `speed` times as fast. Rounding to 100 Hz keeps
        # the resampling filter short.
        rate = round(SAMPLING_RATE / speed / 100) * 100
        waveform = torchaudio.functional.resample(waveform, SAMPLING_RATE, rate).numpy()
        return {**row, "waveform": waveform, "duration_s": len(waveform) / SAMPLING_RATE}
