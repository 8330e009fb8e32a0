"""Voices as speaker embeddings: 512 numbers that tell a SpeechT5 who is to speak."""

import hashlib
import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from .audio import SAMPLING_RATE, log_mel_spectrogram
from .data.rows import SPEAKER_EMBEDDING_DIM as DIM
from .errors import UserError
from .models.loading import best_device, hub_commit, loading, read_any_config, resolve

MEL_STATISTICS = "mel_statistics"
UTTERANCES = 10  # recordings of a speaker that its embedding is the mean of
LEAST_S = 1.0  # shorter recordings say too little about who speaks
ADVISED_S = 3.0
LEAST_HEARD_S = 0.5  # networks fail on less: shorter recordings are followed by silence up to here
ONE_VOICE = "voice"  # name of the speaker where the whole dataset has one

logger = logging.getLogger("hfspeech")


def load_speaker_encoder(name, revision="main"):
    """Returns what makes speaker embeddings of recordings.

    Args:
        name: `mel_statistics`: mean and deviation of the mel spectrum, needs nothing, tells few voices apart, and says
            more of the room and the microphone than a network would; Hub id or folder of a `WavLMForXVector`; or a
            `speechbrain/…` encoder such as `speechbrain/spkrec-xvect-voxceleb`, with which microsoft/speecht5_tts was
            trained, if SpeechBrain is installed.
        revision: branch, tag or commit on the Hub.

    Returns:
        Callable from a list of float32 waveforms (16 kHz) to float32 (number, 512), rows of length 1.

    Raises:
        UserError: no such model, or SpeechBrain is not installed.
    """
    if name == MEL_STATISTICS:
        return MelStatistics()
    # SpeechBrain runs what the encoder's hyperparams.yaml says, so it may be its own organisation's alone, no folder here.
    if re.fullmatch(r"speechbrain/[\w.-]+", name) and not Path(name).exists():
        return SpeechBrainEncoder(name)
    return XVectorEncoder(name, revision)


class MelStatistics:
    """The speaker embedding that needs no network: how a voice's energy is spread over the mel bands, and varies.

    Mean and standard deviation of 80 log-mel bands over the frames of speech, 40 dB deep; the mean without its own mean
    and slope, so that neither loudness nor tilt of the microphone counts; each scaled to unit variance; projected to 512
    numbers by a fixed random matrix, which keeps angles (Johnson and Lindenstrauss 1984).
    """

    name, hub_commit = MEL_STATISTICS, None

    def __init__(self):
        from transformers import SpeechT5FeatureExtractor

        self.extractor = SpeechT5FeatureExtractor()
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.randn(2 * self.extractor.num_mel_bins, DIM, generator=generator) / DIM**0.5

    def __call__(self, waveforms):
        return torch.stack([self._one(waveform) for waveform in waveforms])

    def _one(self, waveform):
        spectrogram = log_mel_spectrogram(waveform, self.extractor)
        loudness = spectrogram.mean(dim=1)
        speech = spectrogram[loudness > loudness.max() - 2]  # log10: 2 are 40 dB
        mean, deviation = speech.mean(dim=0), speech.std(dim=0, unbiased=False)
        slope = torch.linspace(-1, 1, len(mean))
        mean = mean - mean.mean()
        mean = mean - slope * (mean @ slope) / (slope @ slope)
        deviation = deviation - deviation.mean()
        parts = [part / part.square().mean().sqrt().clamp(min=1e-6) for part in (mean, deviation)]
        return torch.nn.functional.normalize(torch.cat(parts) @ self.projection, dim=0)


class XVectorEncoder:
    """Speaker embeddings of a `WavLMForXVector`, remembered on disk by what was heard."""

    def __init__(self, name, revision="main"):
        from transformers import AutoFeatureExtractor, WavLMForXVector

        self.name = name
        source = resolve(name)
        with loading(source, revision, "WavLMForXVector"):
            config = read_any_config(source, revision)
            if config.model_type != "wavlm":
                raise UserError(
                    f"--speaker_encoder {name} is a {config.model_type} model, not a WavLM: give one such as "
                    "microsoft/wavlm-base-plus-sv, or mel_statistics."
                )
            self.extractor = AutoFeatureExtractor.from_pretrained(source, revision=revision, trust_remote_code=False)
            model = WavLMForXVector.from_pretrained(source, config=config, revision=revision, use_safetensors=True)
            self.model = model.eval().to(best_device())
            self.hub_commit = hub_commit(source, revision)
        if self.model.config.xvector_output_dim != DIM:
            raise UserError(
                f"--speaker_encoder {name} makes {self.model.config.xvector_output_dim} numbers, and SpeechT5 takes {DIM}: "
                "choose another, such as microsoft/wavlm-base-plus-sv."
            )
        state = hashlib.blake2b(digest_size=16)
        for tensor in self.model.state_dict().values():
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()[:4096].tobytes())
        self.cache = _Cache(state.hexdigest())

    def __call__(self, waveforms):
        return torch.stack([self.cache.get(waveform, self._one) for waveform in waveforms])

    @torch.no_grad()
    def _one(self, waveform):
        inputs = self.extractor(_long_enough(waveform), sampling_rate=SAMPLING_RATE, return_tensors="pt").to(
            self.model.device
        )
        return torch.nn.functional.normalize(self.model(**inputs).embeddings[0].float().cpu(), dim=0)


class SpeechBrainEncoder:
    """Speaker embeddings of a SpeechBrain encoder, remembered on disk by what was heard."""

    hub_commit = None  # SpeechBrain does not say

    def __init__(self, name):
        try:
            from speechbrain.inference.speaker import EncoderClassifier
        except ImportError:
            raise UserError(
                f"--speaker_encoder {name} needs SpeechBrain: pip install speechbrain, or take "
                "microsoft/wavlm-base-plus-sv, which needs nothing more."
            ) from None
        self.name = name
        with loading(name, "main", "SpeechBrain encoder"):
            self.model = EncoderClassifier.from_hparams(source=name, run_opts={"device": str(best_device())})
        self.cache = _Cache(hashlib.blake2b(name.encode(), digest_size=16).hexdigest())

    def __call__(self, waveforms):
        return torch.stack([self.cache.get(waveform, self._one) for waveform in waveforms])

    @torch.no_grad()
    def _one(self, waveform):
        found = self.model.encode_batch(torch.from_numpy(_long_enough(waveform))[None]).squeeze().float().cpu()
        return torch.nn.functional.normalize(found, dim=0)


def _long_enough(waveform):
    return np.pad(waveform, (0, max(0, round(LEAST_HEARD_S * SAMPLING_RATE) - len(waveform))))


class _Cache:
    """Embeddings on disk, one small file for each recording, named by its samples and by who listened."""

    def __init__(self, listener):
        from huggingface_hub import constants

        self.folder = Path(constants.HF_HOME) / "hfspeech" / "speaker_embeddings" / listener

    def get(self, waveform, make):
        waveform = np.ascontiguousarray(waveform, dtype=np.float32)
        path = self.folder / f"{hashlib.blake2b(waveform.tobytes(), digest_size=16).hexdigest()}.npy"
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            found = make(waveform)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part.npy")
            np.save(part, found.numpy())
            os.replace(part, path)
        except OSError:  # a cache that cannot be written costs time, not the run
            pass
        return found


def voice_of(waveform, encoder, name="the recording"):
    """Returns the embedding of the voice in one recording, (512,) float32.

    Raises:
        UserError: it is too short to tell who speaks.
    """
    seconds = len(waveform) / SAMPLING_RATE
    if seconds < LEAST_S:
        raise UserError(
            f"{name} lasts {seconds:.1f} s, too short to tell a voice: give at least {LEAST_S:g} s of speech, better "
            f"{ADVISED_S:g} s."
        )
    if seconds < ADVISED_S:
        logger.warning("%s lasts %.1f s: %g s or more give a truer voice", name, seconds, ADVISED_S)
    return encoder([waveform])[0]


class Voices:
    """The speaker embedding of every row.

    Args:
        per: `speaker`, `utterance`, `dataset` or `column`: what has an embedding of its own.
        embeddings: dict to a float32 tensor of shape (512,), of speaker name or (dataset, speaker name), or of (dataset,
            split, row) for `utterance`.
        speakers: dict of speaker name to embedding, those that are of use for later. Default: all of `embeddings`.
    """

    dim = DIM

    def __init__(self, per, embeddings, speakers=None):
        self.per, self.embeddings = per, embeddings
        self.speakers = embeddings if speakers is None and per in ("speaker", "dataset") else speakers or {}

    def of(self, row):
        """Returns the embedding of a row, (512,) float32."""
        if self.per == "column":
            return torch.nn.functional.normalize(torch.tensor(row["speaker_embedding"], dtype=torch.float32), dim=0)
        return self.embeddings[self._key(row)]

    def _key(self, row):
        if self.per == "utterance":
            return row["dataset"], row["split"], row["row"]
        if self.per == "dataset":
            return ONE_VOICE
        own = row.get("dataset"), row["speaker"]  # "1" of one dataset is not "1" of another
        return own if own in self.embeddings else row["speaker"]


def find_voices(speech, model_args, encoder):
    """Finds the speaker embedding of every row, once for each speaker or utterance.

    A speaker's embedding is the mean of those of its first `UTTERANCES` recordings that are long enough, taken from the
    training rows where it speaks in them, else from its own split.

    Args:
        speech: `SpeechSplits`; rows that hold an embedding keep it.
        model_args: `SpeechT5Arguments`: `speaker_embedding_per`, `speaker_embeddings_file`.
        encoder: what `load_speaker_encoder` returns.

    Returns:
        `Voices`.

    Raises:
        UserError: no speaker column, an embedding of another size, or a file without some speaker.
    """
    if all("speaker_embedding" in rows.column_names for rows in speech.values()):  # --speaker_embedding_column_name
        return Voices("column", {})
    if model_args.speaker_embeddings_file:
        return _from_file(Path(model_args.speaker_embeddings_file), speech)
    if model_args.speaker_embedding_per == "utterance":
        return Voices("utterance", _of_utterances(speech, encoder))
    if model_args.speaker_embedding_per == "speaker":
        for name, rows in speech.items():
            if None in rows.column("speaker"):
                raise UserError(
                    f"Not every row of {name} names its speaker: say in which column with --speaker_column_name; or, if "
                    "one person speaks, --speaker_embedding_per dataset; or --speaker_embedding_per utterance."
                )
    found = {}
    for rows in speech.values():  # train comes first
        speakers = list(zip(rows.column("dataset"), rows.column("speaker")))
        if model_args.speaker_embedding_per == "dataset":
            speakers = [ONE_VOICE] * len(speakers)
        for speaker in dict.fromkeys(speakers):
            if speaker not in found:
                numbers = [i for i, name in enumerate(speakers) if name == speaker]
                found[speaker] = _mean_of(rows, numbers, encoder)
    logger.info("%d voices, by %s", len(found), encoder.name)
    if model_args.speaker_embedding_per == "dataset":
        return Voices("dataset", found)
    return Voices("speaker", found, _learnt(speech["train"], found))


def _learnt(train, found):
    """Returns the voices that the training rows have, by name; by dataset and name where a name is not unique."""
    keys = [key for key in dict.fromkeys(zip(train.column("dataset"), train.column("speaker"))) if found[key].any()]
    names = Counter(name for _, name in keys)
    return {name if names[name] == 1 else f"{dataset}/{name}": found[dataset, name] for dataset, name in keys}


def _mean_of(rows, numbers, encoder):
    durations_s = rows.column("duration_s")
    enough = [i for i in numbers if durations_s[i] >= LEAST_S] or numbers
    waveforms = [row["waveform"] for row in map(rows.__getitem__, enough[:UTTERANCES]) if row["waveform"] is not None]
    if not waveforms:
        return torch.zeros(DIM)  # nothing can be read of it; its rows will say so
    return torch.nn.functional.normalize(encoder(waveforms).mean(dim=0), dim=0)


def _of_utterances(speech, encoder):
    found = {}
    for rows in speech.values():
        for index in range(len(rows)):
            row = rows[index]
            if row["waveform"] is not None:
                found[row["dataset"], row["split"], row["row"]] = encoder([row["waveform"]])[0]
    return found


def _from_file(path, speech):
    if not path.exists():
        raise UserError(
            f"There is no file {path} for --speaker_embeddings_file: check its path (from here, {Path.cwd()})."
        )
    if path.suffix == ".npy":
        try:
            vector = torch.from_numpy(np.load(path, allow_pickle=False)).float().flatten()
        except (ValueError, TypeError, EOFError, OSError):
            raise UserError(f"{path} is damaged, or not an .npy file of numbers: write it again.") from None
        return Voices("dataset", {ONE_VOICE: _checked(vector, path)})
    if path.suffix != ".safetensors":
        raise UserError(f"--speaker_embeddings_file {path} has to be a .safetensors or an .npy file: save it as one.")
    import safetensors
    from safetensors.torch import load_file

    try:
        found = {name: _checked(vector.float().flatten(), path) for name, vector in load_file(path).items()}
    except safetensors.SafetensorError:
        raise UserError(f"{path} is damaged, or not a .safetensors file: write it again.") from None
    for name, rows in speech.items():
        missing = set(rows.column("speaker")) - found.keys()
        if missing:
            raise UserError(
                f"{path} has no embedding for {len(missing)} speakers of {name}, such as {sorted(map(str, missing))[0]}: "
                f"it has {', '.join(sorted(found)[:8])}."
            )
    return Voices("speaker", found)


def _checked(vector, path):
    if len(vector) != DIM:
        raise UserError(f"{path} holds an embedding of {len(vector)} numbers, and SpeechT5 takes {DIM}: make it anew.")
    if not torch.isfinite(vector).all() or not vector.any():
        raise UserError(f"{path} holds an embedding that is zero or not finite: make it anew.")
    return torch.nn.functional.normalize(vector, dim=0)
