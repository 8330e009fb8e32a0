"""Vocoders: from SpeechT5's spectrograms to sound."""

from pathlib import Path

import torch
from torch.nn import functional

from hfspeech.errors import UserError, nearest
from hfspeech.hardware import can_train_in_bf16
from hfspeech.models.loading import best_device, hub_commit, loading, resolve

HIFIGAN = "microsoft/speecht5_hifigan"
MODEL_TYPES = ("hifigan", "speecht5_hifigan")  # published with older releases of transformers, saved by today's
NAMES = ("griffin_lim", "hifigan")
SAMPLING_RATE, NUM_MEL_BINS, HOP_LENGTH, FFT_LENGTH = 16000, 80, 256, 1024  # as in SpeechT5FeatureExtractor
LOG_MEL_FLOOR = -10.0
# More of either brings the spectrogram of real speech no nearer, and is understood no better.
INVERSION_ROUNDS, PHASE_ROUNDS = 10, 64
ROWS_AT_ONCE = 8


def load_vocoder(name, revision="main"):
    """Loads what turns log-mel spectrograms into waveforms.

    Args:
        name: `griffin_lim`, which needs no model and sounds hollow; `hifigan`, which is `HIFIGAN`; or the folder or Hub
            id of another `SpeechT5HifiGan`.
        revision: branch, tag or commit on the Hub.

    Returns:
        A vocoder with `name` and `sampling_rate` (16000). Called with a list of (frames, 80) float tensors, log10 mel as
        SpeechT5 makes them, on any device, it returns for each a float32 array of 256 samples a frame in [-1, 1]. The
        same spectrograms give the same sound.

    Raises:
        UserError: no such vocoder, no access, half-written weights, or a vocoder for another kind of spectrogram.
    """
    if name == "griffin_lim":
        return GriffinLim()
    if name not in NAMES and not Path(name).expanduser().exists() and str(name).count("/") != 1:
        raise UserError(
            f"There is no vocoder {name}.{nearest(name, NAMES)} Give griffin_lim, hifigan, or a folder that exists "
            "or a Hub id of a SpeechT5HifiGan."
        )
    source = resolve(HIFIGAN if name == "hifigan" else name)
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise UserError(
            f"{source} holds no config.json, so it is not a vocoder: give the folder of a SpeechT5HifiGan."
        )
    with loading(source, revision, "SpeechT5HifiGan"):
        return HifiGan(str(name), _load_hifigan(source, revision))


class GriffinLim:
    """Griffin and Lim's search for the phases that fit, after the mel bins are spread over the linear ones."""

    name, sampling_rate, hub_commit = "griffin_lim", SAMPLING_RATE, None

    def __init__(self):
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(
            num_frequency_bins=FFT_LENGTH // 2 + 1,
            num_mel_filters=NUM_MEL_BINS,
            min_frequency=80,
            max_frequency=7600,
            sampling_rate=SAMPLING_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters = torch.from_numpy(filters).float()  # (513, 80)
        self.inverse = torch.linalg.pinv(self.filters)
        self.window = torch.hann_window(FFT_LENGTH)

    @torch.no_grad()
    def __call__(self, spectrograms):
        return [self._waveform(spectrogram.float().cpu()) for spectrogram in spectrograms]

    def _waveform(self, spectrogram):
        from torchaudio.functional import griffinlim

        # The last frame lies around the last sample: one frame of silence more makes it 256 samples a frame. The
        # reflection at the ends needs a few more than the shortest rows have.
        num_frames = len(spectrogram)
        padding = max(1, 5 - num_frames)
        spectrogram = functional.pad(spectrogram, (0, 0, 0, padding), value=LOG_MEL_FLOOR)
        with torch.random.fork_rng(devices=[]):  # the phases to start from
            torch.manual_seed(0)
            waveform = griffinlim(
                self._magnitudes(10**spectrogram).T.contiguous(),
                self.window,
                n_fft=FFT_LENGTH,
                hop_length=HOP_LENGTH,
                win_length=FFT_LENGTH,
                power=1.0,
                n_iter=PHASE_ROUNDS,
                momentum=0.99,
                length=None,
                rand_init=True,
            )
        return waveform[: num_frames * HOP_LENGTH].clamp(-1, 1).numpy()

    def _magnitudes(self, mel):
        """Non-negative least squares by multiplicative updates (Lee and Seung 2001): (frames, 80) to (frames, 513)."""
        magnitudes = (mel @ self.inverse).clamp(min=1e-8)
        wanted, overlap = mel @ self.filters.T, self.filters @ self.filters.T
        for _ in range(INVERSION_ROUNDS):
            magnitudes = magnitudes * wanted / (magnitudes @ overlap).clamp(min=1e-12)
        return magnitudes


class HifiGan:
    """A `SpeechT5HifiGan`; rows of like length are turned into sound together where that is faster.

    rows_at_once: how many. Together, the shorter rows are continued with their last frame, which a vocoder knows better
    than digital silence, and cut again: only the last frames that the convolutions see can differ from the row alone.
    On a CPU it is 1, where more are not faster.
    in_bf16: whether it multiplies in bf16, as a CPU does where that is faster; the difference is not to be heard.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, name, model):
        self.name, self.model = name, model.eval().to(best_device())
        self.hub_commit = getattr(model, "hub_commit", None)
        on_cpu = self.model.device.type == "cpu"
        self.rows_at_once = 1 if on_cpu else ROWS_AT_ONCE
        self.in_bf16 = on_cpu and can_train_in_bf16(model.config.upsample_initial_channel)[0]

    @torch.no_grad()
    def __call__(self, spectrograms):
        order = sorted(range(len(spectrograms)), key=lambda row: len(spectrograms[row]))
        waveforms = [None] * len(spectrograms)
        for start in range(0, len(order), self.rows_at_once):
            rows = order[start : start + self.rows_at_once]
            longest = len(spectrograms[rows[-1]])
            batch = [spectrograms[row].to(self.model.device, torch.float32) for row in rows]
            batch = torch.stack([torch.cat([one, one[-1:].expand(longest - len(one), -1)]) for one in batch])
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.in_bf16):
                found = self.model(batch).float().cpu()
            for row, waveform in zip(rows, found):
                waveforms[row] = waveform[: len(spectrograms[row]) * HOP_LENGTH].numpy().copy()
        return waveforms


def _load_hifigan(source, revision):
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    settings, _ = SpeechT5HifiGanConfig.get_config_dict(source, revision=revision)
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:  # any config.json would be read as a vocoder's, with defaults for all that it lacks
        raise UserError(f"{source} is a {kind} model, not a vocoder: give a SpeechT5HifiGan.")
    config = SpeechT5HifiGanConfig.from_dict(settings)
    config._attn_implementation = None  # as in read_any_config
    samples_per_frame = 1
    for rate in config.upsample_rates:
        samples_per_frame *= rate
    found = config.sampling_rate, config.model_in_dim, samples_per_frame
    if found != (SAMPLING_RATE, NUM_MEL_BINS, HOP_LENGTH):
        raise UserError(
            f"{source} makes {found[0]} Hz from {found[1]} mel bins, {found[2]} samples a frame; SpeechT5 needs "
            f"{SAMPLING_RATE} Hz, {NUM_MEL_BINS} and {HOP_LENGTH}: give a vocoder of that kind."
        )
    model, info = SpeechT5HifiGan.from_pretrained(
        source,
        config=config,
        revision=revision,
        dtype=torch.float32,
        output_loading_info=True,
        use_safetensors=True,
    )
    if info["missing_keys"]:  # transformers would fill them with noise
        raise OSError(f"{sorted(info['missing_keys'])[0]} is missing")
    model.hub_commit = hub_commit(source, revision)
    return model
