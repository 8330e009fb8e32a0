"""Objective measures of synthesised speech, each beside the true recording of the same words.

They say whether the words can be heard (by a recogniser), whether the sound and the melody are those of the recording,
whose voice it is, and whether the model stopped where it should. How natural it sounds only a model of listeners
guesses, where one is given: listen.
"""

import hashlib
import re
from functools import lru_cache

import jiwer
import numpy as np

from hfspeech.audio import SAMPLING_RATE, log_mel_spectrogram
from hfspeech.errors import UserError
from hfspeech.metrics.transcripts import ratios, rows_by_value, score, total_rate
from hfspeech.text import normalizer as normalizer_named

HOP = 256  # samples between the frames of SpeechT5FeatureExtractor: 16 ms
NUM_CEPSTRA = 13

# Pitch: from a deep man's voice to a child's; the window holds two periods of the lowest.
MIN_F0_HZ, MAX_F0_HZ = 60, 500
PITCH_WINDOW = 512
# Normalised differences of YIN (0 for a perfectly periodic sound, about 1 for noise). The first is within the range of
# the paper; with the second, white and pink noise are unvoiced, and on flite's voices more brings octave errors.
PERIODIC, VOICED = 0.15, 0.35

# Seconds against those of the true recording's speech: wide enough that another voice's own pace is no fault.
EARLY, LATE = 0.7, 1.4
MIN_HEARD_S = 0.5  # speaker encoders and recognisers fail on less: shorter sound is followed by silence up to here

MEASURES = ("mcd", "log_f0_rmse", "speaker_similarity", "duration_ratio")
STOPS = ("ok", "early", "late", "never")


class SynthesisScore:
    """Scores rows of synthesised speech; what the trainer takes as its metric for text-to-speech.

    Args:
        recognise: callable from a list of waveforms (float32, 16 kHz) to the list of texts heard in them.
        embed: callable from a list of waveforms to speaker embeddings, a float tensor (n, 512) of rows of length 1.
        group_columns: columns whose values get their own measures each, or None.
        name: text normaliser, as in `hfspeech.text.normalizer`; `auto` follows the language. `english` has no table of
            British spellings here.
        language: of the text; only `auto` looks at it.
        rate: callable from a list of waveforms and a list of as many true recordings of other words to their mean
            opinion scores, such as `hfspeech.models.opinion.Squim`; None for none.

    Calling it takes a list of rows, dicts with `index`, `text` (what was to be said), perhaps `speaker` and the group
    columns, `is_unfinished` (synthesis reached its bound), and three waveforms: `waveform` (synthesised), `reference`
    (the true recording of the text) and `vocoded` (the true recording's spectrogram through the vocoder).

    The rows are changed, so that they can be written as JSON: the waveforms are taken out, `prediction` (what was
    heard) and the row's own `mcd`, `log_f0_rmse`, `speaker_similarity`, `duration_ratio`, `stop` and, with `rate`,
    `mos` are put in. Synthesised sound that is empty, zero or not finite is heard as "" and has no `mcd`,
    `log_f0_rmse`, `speaker_similarity` and `mos` (None).

    Returns:
        All that `hfspeech.metrics.score` returns for what was heard, and

        - `mcd` (dB, see `mel_cepstral_distortion`), `log_f0_rmse` (see there), `speaker_similarity` (cosine of the
          embeddings of the synthesised and the true recording) and `duration_ratio` (seconds of the synthesised
          sound, silence included, per second of the true recording's speech): means over the rows that have the
          number, each with `_low` and `_high`, resampled as the error rates are (`interval` says over what); with
          `rate`, `mos` (1 to 5) in the same way, each row held against the true recording of the next;
        - `measured_rows`: measure → how many rows have it; the others are left out of its mean;
        - `stop`: `ok`, `early`, `late`, `never` → share of the rows (see `stop_health`);
        - `repeated_words`, `skipped_words`: counts over all rows (see `repeated_and_skipped`);
        - the same for every value in `groups`;
        - `ceiling`: what the same recogniser hears when nothing was synthesised: `recordings` → `wer`, `cer` of the
          true recordings; `vocoded` → `wer`, `cer`, `mcd`, `speaker_similarity` of their vocoded spectrograms. A
          perfect spectrogram scores like `vocoded`. With `rate`, both have their `mos`. These depend on the rows alone and
          are remembered by the waveforms' bytes: the next call with the same rows recognises and embeds only what is new.

    Raises:
        UserError: as `score`; a true recording has no sound.
    """

    def __init__(self, recognise, embed, group_columns=None, name="auto", language="en", rate=None):
        self.recognise, self.embed, self.rate = recognise, embed, rate
        self.measures = MEASURES + ("mos",) * (rate is not None)
        self.group_columns = group_columns or []
        self.normalizer = normalizer_named(name, language)
        self._known = {}  # of true and vocoded recordings, by their bytes: the text heard, and the embedding
        self._known_mcd, self._known_mos = {}, {}  # of pairs of them

    def __call__(self, rows):
        sounds = [{key: _mono(row[key]) for key in ("waveform", "reference", "vocoded")} for row in rows]
        for row, sound in zip(rows, sounds):
            if not sound["reference"].any():
                raise UserError(
                    f"Row {row.get('index')}: the true recording has no sound to compare with; take the row out."
                )
        heard = self._perceive([sound["waveform"] for sound in sounds])
        true = self._remembered([sound["reference"] for sound in sounds])
        vocoded = self._remembered([sound["vocoded"] for sound in sounds])
        for row, sound, (text, voice), (_, true_voice) in zip(rows, sounds, heard, true):
            row["prediction"] = text
            row["mcd"] = mel_cepstral_distortion(sound["waveform"], sound["reference"])
            row["log_f0_rmse"] = log_f0_rmse(sound["waveform"], sound["reference"])
            row["speaker_similarity"] = _cosine(voice, true_voice)
            seconds, speech_s = len(sound["waveform"]) / SAMPLING_RATE, _speech_s(sound["reference"])
            row["duration_ratio"] = seconds / speech_s
            row["stop"] = stop_health(seconds, speech_s, row["is_unfinished"])
            for key in sound:
                del row[key]
        others = [sound["reference"] for sound in sounds[1:] + sounds[:1]]
        if self.rate:
            for row, mos in zip(rows, self._opinions([sound["waveform"] for sound in sounds], others)):
                row["mos"] = mos

        texts, speakers = [row["text"] for row in rows], [row.get("speaker") for row in rows]
        result = score(
            [row["prediction"] for row in rows],
            texts,
            speakers=speakers,
            groups={column: [row.get(column) for row in rows] for column in self.group_columns},
            normalizer=self.normalizer,
        )
        words = [
            repeated_and_skipped(self.normalizer(row["prediction"]), self.normalizer(row["text"])) for row in rows
        ]
        result |= _measures(rows, words, speakers, self.measures)
        for column, values in result["groups"].items():
            for value, numbers in rows_by_value([row.get(column) for row in rows]).items():
                chosen = ([of_row[number] for number in numbers] for of_row in (rows, words, speakers))
                values[value] |= _measures(*chosen, self.measures)
        result["ceiling"] = {
            "recordings": self._rates(true, texts),
            "vocoded": {
                **self._rates(vocoded, texts),
                "mcd": _mean([self._mcd_of(sound["vocoded"], sound["reference"]) for sound in sounds]),
                "speaker_similarity": _mean([_cosine(voice, other) for (_, voice), (_, other) in zip(vocoded, true)]),
            },
        }
        if self.rate:
            for name, key in (("recordings", "reference"), ("vocoded", "vocoded")):
                result["ceiling"][name]["mos"] = _mean(self._remembered_mos([sound[key] for sound in sounds], others))
        return result

    def _perceive(self, waveforms):
        """Returns (text, embedding) for every waveform; ("", None) where there is no sound."""
        result = [("", None)] * len(waveforms)
        audible, sounds = _audible(waveforms)
        if audible:
            voices = self.embed(sounds).float().cpu().numpy()
            for number, text, voice in zip(audible, self.recognise(sounds), voices, strict=True):
                result[number] = text, voice
        return result

    def _remembered(self, waveforms):
        keys = [_key(waveform) for waveform in waveforms]
        new = {key: waveform for key, waveform in zip(keys, waveforms) if key not in self._known}
        self._known.update(zip(new, self._perceive(list(new.values()))))
        return [self._known[key] for key in keys]

    def _opinions(self, waveforms, others):
        """Returns the mean opinion score of every waveform, held against another; None where there is no sound."""
        result = [None] * len(waveforms)
        audible, sounds = _audible(waveforms)
        for number, mos in zip(audible, self.rate(sounds, [others[i] for i in audible]), strict=True):
            result[number] = mos
        return result

    def _remembered_mos(self, waveforms, others):
        pairs = {(_key(waveform), _key(other)): (waveform, other) for waveform, other in zip(waveforms, others)}
        new = {keys: pair for keys, pair in pairs.items() if keys not in self._known_mos}
        if new:
            self._known_mos.update(zip(new, self._opinions(*zip(*new.values()))))
        return [self._known_mos[_key(waveform), _key(other)] for waveform, other in zip(waveforms, others)]

    def _mcd_of(self, waveform, reference):
        pair = _key(waveform), _key(reference)
        if pair not in self._known_mcd:
            self._known_mcd[pair] = mel_cepstral_distortion(waveform, reference)
        return self._known_mcd[pair]

    def _rates(self, heard, texts):
        sides = [text for text, _ in heard], texts, self.normalizer
        return {
            "wer": total_rate(jiwer.process_words, *sides)[0],
            "cer": total_rate(jiwer.process_characters, *sides)[0],
        }


def mel_cepstra(waveform):
    """Returns the mel-frequency cepstrum of the speech in a recording: what a spectrum sounds like, without loudness.

    Leading and trailing silence is left out. The spectrum is what `SpeechT5FeatureExtractor` makes (amplitudes in 80
    slaney mel bands from 80 to 7600 Hz, 64 ms Hann windows every 16 ms), in natural logarithms x_0 … x_79. Its
    cosine series is x_n = c_0 + sum of c_k cos(pi k (n + 1/2) / 80), so c_k is the orthonormal DCT-II times
    sqrt(2 / 80). In that scale the distance of `mel_cepstral_distortion` is in decibels; with the orthonormal
    coefficients themselves it would come out sqrt(40) = 6.3 times as large.

    Args:
        waveform: float array of shape (samples,), 16 kHz.

    Returns:
        float64 array of shape (frames, 13): c_1 … c_13. Shape (0, 13) if there is no sound.
    """
    speech = _speech(waveform)
    if len(speech) == 0:
        return np.zeros((0, NUM_CEPSTRA))
    extractor, cosines = _analysis()
    return np.log(10) * log_mel_spectrogram(speech, extractor).double().numpy() @ cosines


@lru_cache(maxsize=1)
def _analysis():
    from transformers import SpeechT5FeatureExtractor

    extractor = SpeechT5FeatureExtractor()
    bands, orders = np.arange(extractor.num_mel_bins) + 0.5, np.arange(1, NUM_CEPSTRA + 1)
    cosines = np.cos(np.pi / extractor.num_mel_bins * np.outer(bands, orders)) * 2 / extractor.num_mel_bins
    return extractor, cosines


def align(a, b):
    """Finds which frames of two sequences belong together: dynamic time warping.

    The path goes from the first pair of frames to the last in steps of one frame of `a`, of `b` or of both, and has
    the smallest sum of Euclidean distances of all such paths (all steps weigh the same; both is preferred in a tie).

    Args:
        a, b: float arrays of shape (frames, coefficients), at least one frame each.

    Returns:
        (path: integer array of shape (steps, 2), the frame of `a` and of `b`; distances along it: (steps,) float64).

    Source: Sakoe and Chiba 1978, "Dynamic programming algorithm optimization for spoken word recognition", without
    a slope constraint.
    """
    if len(a) > len(b):
        path, distances = align(b, a)
        return path[:, ::-1], distances
    n, m = len(a), len(b)
    distance = np.zeros((n, m))
    for one, other in zip(np.asarray(a, np.float64).T, np.asarray(b, np.float64).T):
        distance += (one[:, None] - other) ** 2
    np.sqrt(distance, out=distance)

    # All cells of an anti-diagonal depend on the two before it only, so each is one step of numpy: row d of `steps`
    # holds the distances of the pairs (i, d - i), rows d, d + 1, d + 2 of `total` the sums up to d - 2, d - 1, d.
    skewed = np.full((n, n + m), np.inf)
    skewed[:, :m] = distance
    steps = np.ascontiguousarray(skewed.ravel()[: n * (n + m - 1)].reshape(n, n + m - 1).T)
    total = np.full((n + m + 1, n + 1), np.inf)
    total[0, 0] = 0
    for d in range(n + m - 1):
        best = np.minimum(total[d + 1, :-1], total[d + 1, 1:])
        total[d + 2, 1:] = np.minimum(best, total[d, :-1]) + steps[d]

    i, j = n - 1, m - 1
    path = [(i, j)]
    while i or j:
        d = i + j
        both, only_a, only_b = total.item(d, i), total.item(d + 1, i), total.item(d + 1, i + 1)
        if both <= only_a and both <= only_b:
            i, j = i - 1, j - 1
        elif only_a <= only_b:
            i -= 1
        else:
            j -= 1
        path.append((i, j))
    path = np.array(path[::-1])
    return path, distance[path[:, 0], path[:, 1]]


def mel_cepstral_distortion(waveform, reference):
    """Returns how far the sound of a recording is from that of the true one, in decibels; 0 for the same sound.

    For two frames it is 10 / ln 10 * sqrt(2 * sum over k = 1 … 13 of (c_k - c'_k)^2), with `mel_cepstra`: the root
    mean square difference in dB between their spectra in 80 mel bands, smoothed to 13 cosines, level apart. The result
    is the mean over the frames that dynamic time warping (`align`) pairs. It depends on the mel bands, the number of
    coefficients and the warping: compare it only with figures made in this way.

    Args:
        waveform, reference: float arrays of shape (samples,), 16 kHz; silence around the speech does not count.

    Returns:
        float, or None if one of them has no sound.

    Source: Kubichek 1993, "Mel-cepstral distance measure for objective speech quality assessment".
    """
    a, b = mel_cepstra(waveform), mel_cepstra(reference)
    if not (len(a) and len(b)):
        return None
    return float(10 / np.log(10) * np.sqrt(2) * align(a, b)[1].mean())


def log_f0(waveform):
    """Returns the natural logarithm of the fundamental frequency (Hz) of the speech in a recording, frame by frame.

    YIN, on the frames of `mel_cepstra`: the difference between 32 ms of sound and the same a lag later, divided by its
    mean over all shorter lags; the first lag at which it has a minimum below 0.15 is the period (or else the smallest
    value's), refined by a parabola; from 60 to 500 Hz. A frame is voiced if that minimum is below 0.35. Both the
    voicing and the value are then the median over five frames (80 ms), which takes out single octave errors.

    Args:
        waveform: float array of shape (samples,), 16 kHz.

    Returns:
        float64 array of shape (frames,), NaN where unvoiced; as many frames as `mel_cepstra` has.

    Source: de Cheveigne and Kawahara 2002, "YIN, a fundamental frequency estimator for speech and music".
    """
    speech = _speech(waveform)
    if len(speech) == 0:
        return np.zeros(0)
    shortest, longest = SAMPLING_RATE // MAX_F0_HZ, -(-SAMPLING_RATE // MIN_F0_HZ)
    span = PITCH_WINDOW + longest + 1
    padded = np.pad(speech, (span // 2, span))
    frames = np.lib.stride_tricks.sliding_window_view(padded, span)[::HOP][: 1 + len(speech) // HOP]

    size = 1 << (span - 1).bit_length()
    spectra = np.fft.rfft(frames, size) * np.fft.rfft(frames[:, :PITCH_WINDOW], size).conj()
    correlation = np.fft.irfft(spectra, size)[:, : longest + 2]
    energy = np.cumsum(np.pad(frames.astype(np.float64) ** 2, ((0, 0), (1, 0))), axis=1)
    energy = energy[:, PITCH_WINDOW:] - energy[:, : longest + 2]  # of the window at every lag
    difference = np.maximum(energy[:, :1] + energy - 2 * correlation, 0)[:, 1:]  # from a lag of one sample on
    lags = np.arange(1, longest + 2)
    mean = np.cumsum(difference, axis=1) / lags
    normal = np.divide(difference, mean, out=np.ones_like(difference), where=mean > 1e-12)

    inner = normal[:, shortest - 1 : -1]  # lags from the shortest to the longest, with a neighbour on either side
    before, after = normal[:, shortest - 2 : -2], normal[:, shortest:]
    periodic = (inner < PERIODIC) & (inner <= before) & (inner <= after)
    at = np.where(periodic.any(axis=1), periodic.argmax(axis=1), inner.argmin(axis=1))
    row = np.arange(len(frames))
    left, middle, right = before[row, at], inner[row, at], after[row, at]
    curvature = left - 2 * middle + right
    shift = np.divide(left - right, 2 * curvature, out=np.zeros_like(middle), where=curvature > 1e-12)
    found = np.log(SAMPLING_RATE / (shortest + at + np.clip(shift, -0.5, 0.5)))
    return _median_of_five(np.where(middle < VOICED, found, np.nan))


def _median_of_five(values):
    """Lays a median of five frames over values with NaN; where more than two of the five are NaN, the result is."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(np.pad(values, 2, constant_values=np.nan), 5), axis=1)
    known = 5 - np.isnan(windows).sum(axis=1)  # NaN is sorted to the end
    row, last = np.arange(len(windows)), np.maximum(known - 1, 0)
    medians = (windows[row, last // 2] + windows[row, (last + 1) // 2]) / 2
    return np.where(known > 2, medians, np.nan)


def log_f0_rmse(waveform, reference):
    """Returns how far the pitch of a recording is from that of the true one: a root mean square, in natural logarithms.

    0.0578 is one semitone, 0.69 an octave. It is taken over the pairs of frames along the path of
    `mel_cepstral_distortion` in which both are voiced (see `log_f0`).

    Args:
        waveform, reference: float arrays of shape (samples,), 16 kHz.

    Returns:
        float, or None if no pair of frames is voiced.
    """
    a, b = mel_cepstra(waveform), mel_cepstra(reference)
    if not (len(a) and len(b)):
        return None
    path, _ = align(a, b)
    difference = log_f0(waveform)[path[:, 0]] - log_f0(reference)[path[:, 1]]
    difference = difference[~np.isnan(difference)]
    return float(np.sqrt((difference**2).mean())) if len(difference) else None


def stop_health(seconds, reference_s, is_unfinished):
    """Says whether synthesis stopped where it should: "ok", "early", "late" or "never".

    Args:
        seconds: of the synthesised sound, with any silence at its end.
        reference_s: of the speech in the true recording, without the silence around it.
        is_unfinished: synthesis reached its bound instead of stopping.

    Returns:
        "never" if it is unfinished; "early" below 0.7 times the reference, "late" above 1.4 times; else "ok".
    """
    if is_unfinished:
        return "never"
    ratio = seconds / reference_s
    return "early" if ratio < EARLY else "late" if ratio > LATE else "ok"


def repeated_and_skipped(prediction, reference):
    """Counts words that were said too often and words that were left out.

    Words are aligned as for the word error rate. Repeated are inserted words, and words heard in place of another one
    right after they were heard already ("one one three" for "one two three": one repeated, and "two" skipped).
    Skipped are words without a counterpart. Any other wrong word is neither.

    Args:
        prediction: what was heard, normalised.
        reference: what was to be said, normalised in the same way. In both, numbers are taken digit by digit, because
            the normaliser `english` joins digits that are spoken one by one.

    Returns:
        (repeated, skipped).

    >>> repeated_and_skipped("four four two", "four two nine")
    (1, 1)
    """
    heard, asked = (re.sub(r"(?<=\d)(?=\d)", " ", text).split() for text in (prediction, reference))
    repeated = skipped = 0
    for chunk in jiwer.process_words(" ".join(asked), " ".join(heard)).alignments[0]:
        if chunk.type == "insert":
            repeated += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type == "delete":
            skipped += chunk.ref_end_idx - chunk.ref_start_idx
        elif chunk.type == "substitute":
            words = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
            twice = sum(word > 0 and heard[word] == heard[word - 1] for word in words)
            repeated, skipped = repeated + twice, skipped + twice
    return repeated, skipped


def _measures(rows, words, speakers, measures):
    """Means with their intervals, stops and words of some rows, from the rows' own numbers."""
    known = np.array([[row[measure] is not None for measure in measures] for row in rows])
    values = np.array([[row[measure] or 0.0 for measure in measures] for row in rows])
    counts = np.stack([values, known], axis=2).reshape(len(rows), -1)  # a value and whether there is one, in turn
    result = {}
    for measure, (mean, low, high) in zip(measures, ratios(counts, speakers)[0]):
        result |= {measure: mean, f"{measure}_low": low, f"{measure}_high": high}
    return {
        **result,
        "measured_rows": dict(zip(measures, known.sum(axis=0).tolist())),
        "stop": {stop: sum(row["stop"] == stop for row in rows) / len(rows) for stop in STOPS},
        "repeated_words": sum(repeated for repeated, _ in words),
        "skipped_words": sum(skipped for _, skipped in words),
    }


def _speech_span(waveform):
    """Returns where the speech in a recording starts and ends, in samples; (0, 0) if there is no sound.

    Loudness is measured over 32 ms every 16 ms. Speech is what lies 6 dB over the noise floor (the tenth percentile),
    but from 20 to 40 dB below the loudest, for at least three frames in a row, so that a click is none.
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    if not waveform.any():
        return 0, 0
    power = np.add.reduceat(waveform**2, np.arange(0, len(waveform), HOP))
    level = 10 * np.log10(np.maximum(power + np.append(power[1:], 0), 1e-12))
    threshold = np.clip(np.percentile(level, 10) + 6, level.max() - 40, level.max() - 20)
    loud = level >= threshold
    runs = loud[2:] & loud[1:-1] & loud[:-2]
    if not runs.any():
        return 0, len(waveform)
    first, last = np.flatnonzero(runs)[[0, -1]]
    return int(first) * HOP, min((int(last) + 4) * HOP, len(waveform))  # the last frame of the run, which has two hops


def _audible(waveforms):
    """Returns the numbers of the waveforms in which there is sound, and these, none shorter than can be heard."""
    audible = [number for number, waveform in enumerate(waveforms) if waveform.any()]
    shortest = round(MIN_HEARD_S * SAMPLING_RATE)
    return audible, [np.pad(waveforms[i], (0, max(shortest - len(waveforms[i]), 0))) for i in audible]


def _speech(waveform):
    waveform = _mono(waveform)
    start, end = _speech_span(waveform)
    return waveform[start:end]


def _speech_s(waveform):
    start, end = _speech_span(waveform)
    return (end - start) / SAMPLING_RATE


def _mono(waveform):
    """Returns a float32 array; an empty one if a sample is not finite, which is no sound either."""
    waveform = np.ascontiguousarray(waveform, dtype=np.float32)
    return waveform if np.isfinite(waveform).all() else waveform[:0]


def _key(waveform):
    return hashlib.blake2b(waveform, digest_size=16).digest()


def _cosine(a, b):
    return None if a is None or b is None else float(np.dot(a, b))


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None
