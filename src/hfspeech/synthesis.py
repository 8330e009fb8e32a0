"""Texts of any length, spoken by a SpeechT5: cut into sentences, spoken in batches, joined without a click."""

import collections
import dataclasses
import itertools
import logging
import re

import numpy as np
import torch

from .audio import SAMPLING_RATE
from .batching import trimmed
from .errors import UserError
from .modeling.speech_generation import generate_spectrograms
from .spelling import spell_out

# A piece holds at most so many tokens, which are characters: about ten seconds of speech, the length of an utterance
# that models are trained on. Attention loses its way in texts that are longer than any it has learnt.
MAX_PIECE_TOKENS = 150
# Slow speech takes so many frames of 16 ms a token; normal speech takes four or five. A piece must fit at this pace,
# where the decoder has few positions.
SLOW_FRAMES_PER_TOKEN = 7
SORTED_BATCHES = 8  # pieces are sorted by length within so many batches
SLOWEST, FASTEST = 0.5, 2.0
FADE_S = 0.005
PEAK_DB = -1.0
# Pauses in units of `pause_s`, by what ends there. Trimming leaves 0.1 s between pieces as it is.
PAUSES = {"paragraph": 3.0, "sentence": 1.0, "clause": 0.5, "word": 0.0}

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"""[.!?…؟।]+["'”’“»)\]]*(?=\s)|[。！？]+[」』”’)]*""")
_CLAUSE_END = re.compile(r"[,;:،、，；：](?=\s)|[、，；：](?=\S)|\s[–—-](?=\s)|—(?=\S)")
_SPACE = re.compile(r"\s+")
_OPENING, _CLOSING = "\"'“‘„‚«»(¿¡[", "\"'”’“»)]"
# Abbreviations that come last: with a capital behind them, the sentence is over, unlike after Dr. or No.
_LAST_WORDS = frozenset("etc usw ecc enz itd itp osv Inc Ltd Corp Jr Sr".split())

logger = logging.getLogger("hfspeech")


@dataclasses.dataclass
class Spoken:
    """One text as speech.

    waveform: float32 array of shape (samples,), mono, 16 kHz, in [-1, 1].
    sentences: list of dicts with `text` (as written), `start_s` and `end_s` (seconds from the beginning).
    is_unfinished: a piece of it never came to an end and was cut off.
    unknown: characters of the prepared text that the tokenizer does not have, in order, repeated.
    """

    waveform: np.ndarray
    sentences: list
    is_unfinished: bool
    unknown: list


@dataclasses.dataclass
class Piece:
    """What is spoken in one go: a sentence, or a part of one.

    text: as written, white space made one space; the pieces of a sentence, one after the other, are the sentence.
    ids: its tokens.
    sentence: number of the sentence that it belongs to.
    ends: `paragraph`, `sentence`, `clause` or `word`: what ends with it.
    """

    text: str
    ids: list
    sentence: int
    ends: str


def synthesize(
    model, processor, front_end, vocoder, texts, voices, seed=0, speed=1.0, batch_size=8, pause_s=0.25,
    loudness_db=-23.0, on_progress=None,
):  # fmt: skip
    """Speaks texts of any length.

    A text is cut at the ends of its sentences, a sentence that is too long at a comma or a space (see `split_text`).
    Pieces of like length share batches, whichever text they come from. Each is spoken with a seed of its own, so that
    the result depends on `seed`, the text, its place among the texts and its voice, not on `batch_size` (up to
    rounding). One that does not come to an end is spoken once more, with another seed. Silence at the ends of a piece
    is left out; the pieces are faded over 5 ms and joined with pauses.

    The speed is changed by interpolating the spectrogram's frames before the vocoder, which then makes sound of the
    same pitch with phases of its own. A phase vocoder, laid over the finished sound, would smear its onsets.

    Args:
        model, processor: a `SpeechT5ForTextToSpeech` and its processor, as `load_speecht5_for_inference` returns them.
        front_end: `TextFrontEnd` of its tokenizer.
        vocoder: what `load_vocoder` returns.
        texts: iterable of str, drawn as they are needed. An empty line ends a paragraph.
        voices: an embedding for all, a float tensor of shape (speaker_embedding_dim,), or an iterable of one for each.
        seed: not negative. The decoder's dropout stays on in speech, so another seed says it another way.
        speed: 2 is twice as fast, from 0.5 to 2.
        batch_size: pieces spoken at once.
        pause_s: silence after a sentence, in seconds at speed 1, besides the 0.1 s that trimming leaves; three times as
            much after a paragraph.
        loudness_db: of each text in LUFS (see `at_loudness`), or None to leave it as the vocoder made it.
        on_progress: callable that gets the number of characters spoken since its last call.

    Yields:
        `Spoken` for each text, in order.

    Raises:
        UserError: a speed out of range, or a text in which nothing can be spoken.
    """
    check_speed(speed)
    if torch.is_tensor(voices) and voices.dim() == 1:
        pairs = ((text, voices) for text in texts)
    else:
        pairs = zip(texts, voices, strict=True)
    speaker = _Speaker(model, processor.tokenizer.pad_token_id, vocoder, seed, speed)
    return _synthesize(speaker, front_end, pairs, batch_size, pause_s / speed, loudness_db, on_progress)


def _synthesize(speaker, front_end, pairs, batch_size, pause_s, loudness_db, on_progress):
    on_progress = on_progress or (lambda characters: None)
    max_tokens = max_piece_tokens(speaker.model.config)
    texts, queue, unfinished = collections.deque(), [], []
    for number, (text, voice) in enumerate(itertools.chain(pairs, [(None, None)])):  # None: the queue is emptied
        if text is not None:
            pieces = split_text(text, front_end, max_tokens)
            done = [None] * len(pieces)
            texts.append((text, pieces, done))
            queue += [(piece, voice, (number, place), done) for place, piece in enumerate(pieces)]
        if len(queue) < SORTED_BATCHES * batch_size and text is not None:
            continue
        queue.sort(key=lambda entry: -len(entry[0].ids))
        while queue:
            batch, queue = queue[:batch_size], queue[batch_size:]
            found = speaker.speak([entry[:3] for entry in batch])
            for (piece, _, (_, place), done), spoken in zip(batch, found):
                done[place] = spoken
                if spoken[1]:
                    unfinished.append(piece.text)
            on_progress(sum(len(piece.text) for piece, *_ in batch))
        while texts and None not in texts[0][2]:
            text, pieces, done = texts.popleft()
            on_progress(len(text) - sum(len(piece.text) for piece in pieces))  # white space
            waveform, sentences = _join(pieces, [waveform for waveform, _ in done], pause_s)
            yield Spoken(
                waveform if loudness_db is None else at_loudness(waveform, loudness_db),
                sentences,
                any(is_unfinished for _, is_unfinished in done),
                [character for piece in pieces for character in front_end.unknown(piece.text)],
            )
    if unfinished:
        logger.warning(
            "%d pieces never came to an end and were cut off, such as %r: listen to them, and try another seed",
            len(unfinished), unfinished[0].strip(),
        )  # fmt: skip


def check_speed(speed):
    """Raises a `UserError` unless speech at this speed can still be understood."""
    if not SLOWEST <= speed <= FASTEST:
        raise UserError(f"--speed {speed:g} is out of range: give a number from {SLOWEST:g} to {FASTEST:g}.")


def max_piece_tokens(config):
    """Returns how many tokens a piece may have: as many as is wise, and as a `SpeechT5Config` has positions for."""
    max_frames = config.max_speech_positions * config.reduction_factor
    return max(min(MAX_PIECE_TOKENS, config.max_text_positions, max_frames // SLOW_FRAMES_PER_TOKEN), 2)


# Text


def split_text(text, front_end, max_tokens=MAX_PIECE_TOKENS):
    """Cuts a text into the pieces that are spoken in one go: sentences, and parts of those that are too long.

    A sentence ends with a full stop, a question or an exclamation mark before a space, unless a small letter follows
    (in a text that has capitals), or the full stop is that of an abbreviation, an initial or an ordinal. An empty line
    ends a paragraph. A sentence with more than `max_tokens` is halved, and its halves, until all of them fit: at the
    comma, semicolon, colon or dash nearest to its middle, else at the space, else in a word. What has no letter or
    digit that the tokenizer knows is left out.

    Args:
        text: str.
        front_end: `TextFrontEnd`; its language says what abbreviations and ordinals there are.
        max_tokens: longest piece, the end token included.

    Returns:
        list of `Piece`, at least one.

    Raises:
        UserError: nothing in the text can be spoken.
    """
    pieces, sentence = [], 0
    for paragraph in _PARAGRAPH.split(text.replace("\r\n", "\n").replace("\r", "\n")):
        before = len(pieces)
        for written in split_sentences(" ".join(paragraph.split()), front_end.language):
            parts = [part for part in _halved(written, "sentence", front_end, max_tokens) if _says(part[0], front_end)]
            pieces += [Piece(part, front_end.ids(part), sentence, ends) for part, ends in parts]
            sentence += bool(parts)
        if len(pieces) > before:
            pieces[-1].ends = "paragraph"
    if not pieces:
        raise UserError(_why_nothing(text, front_end))
    return pieces


def split_sentences(text, language="en"):
    """Returns the sentences of one paragraph; joined by spaces, they are the paragraph again.

    >>> split_sentences("Dr. Smith paid 3.50 dollars. Why? Ask J. Doe.")
    ['Dr. Smith paid 3.50 dollars.', 'Why?', 'Ask J. Doe.']

    Args:
        text: one paragraph.
        language: code or English name of its language, for abbreviations and ordinals.
    """
    sentences, start = [], 0
    has_capitals = any(map(str.isupper, text))
    for match in _SENTENCE_END.finditer(text):
        if not _goes_on(text[start : match.end()], text[match.end() :], language, has_capitals):
            sentences.append(text[start : match.end()].strip())
            start = match.end()
    return [sentence for sentence in (*sentences, text[start:].strip()) if sentence]


def _goes_on(before, after, language, has_capitals):
    """Tells whether a sentence goes on behind its full stop."""
    following = after.lstrip(" " + _OPENING)
    if has_capitals and following[:1].islower():
        return True
    before = before.rstrip(_CLOSING)
    if not before.endswith(".") or before.endswith("..") or not following:
        return False
    words = [word.lstrip(_OPENING) for word in before.split()[-3:]]
    if re.fullmatch(r"(?:[^\W\d_]\.)+", words[-1]) and words[-1].lower() != "i.":  # J. Doe, the U.S. Army, z. B.
        return True
    if words[-1][:-1] in _LAST_WORDS:
        return False
    # What the text front end reads away is no end: Dr. Smith, No. 5, am 3. Mai.
    whole, rest = " ".join(words), following.split()[0]
    read, without = (spell_out(f"{start} {rest}", language).count(".") for start in (whole, whole[:-1]))
    return read <= without


def _halved(text, ends, front_end, max_tokens):
    """Returns (part, what ends with it) for the parts of a sentence that fit."""
    if len(text) < 2 or len(front_end.ids(text)) <= max_tokens:
        return [(text, ends)]
    middle, cut, kind = len(text) / 2, len(text) // 2, "word"
    for pattern, ended in ((_SPACE, "word"), (_CLAUSE_END, "clause")):
        cuts = [match.end() for match in pattern.finditer(text) if middle / 2 <= match.end() <= 1.5 * middle]
        if cuts:
            cut, kind = min(cuts, key=lambda place: abs(place - middle)), ended
    return _halved(text[:cut], kind, front_end, max_tokens) + _halved(text[cut:], ends, front_end, max_tokens)


def _says(text, front_end):
    unknown = set(front_end.unknown(text))
    return any(character.isalnum() and character not in unknown for character in front_end(text))


def _why_nothing(text, front_end):
    if not text.strip():
        return "The text is empty: write what is to be said."
    shown = " ".join(text.split())
    shown = shown if len(shown) <= 40 else shown[:39] + "…"
    letters = [character for character in dict.fromkeys(front_end.unknown(text)) if character.isalnum()]
    if letters:
        named = ", ".join(map(repr, letters[:5]))
        return f"The model's tokenizer knows no letter of {shown!r} (not {named}): write it in letters that it knows."
    return f"{shown!r} has no letter or digit: write what is to be said."


# Sound


class _Speaker:
    """Speaks pieces: the model, the vocoder, and how."""

    def __init__(self, model, pad_token_id, vocoder, seed, speed):
        self.model, self.pad_token_id, self.vocoder = model, pad_token_id, vocoder
        self.seed, self.speed = seed, speed

    def speak(self, batch):
        """Returns (waveform, is_unfinished) for each (piece, voice, (number of its text, of the piece))."""
        found = self._generate(batch, attempt=0)
        again = [slot for slot, one in enumerate(found) if one.is_unfinished]
        if again:
            for slot, one in zip(again, self._generate([batch[slot] for slot in again], attempt=1)):
                found[slot] = found[slot] if one.is_unfinished else one
        waveforms = self.vocoder([self._at_speed(one.spectrogram) for one in found])
        return [(_faded(waveform), one.is_unfinished) for waveform, one in zip(waveforms, found)]

    def _generate(self, batch, attempt):
        rows = [torch.tensor(piece.ids) for piece, _, _ in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        voices = torch.stack([torch.as_tensor(voice, dtype=torch.float32) for _, voice, _ in batch])
        seeds = [
            int(np.random.SeedSequence([self.seed, *place, attempt]).generate_state(1)[0]) for _, _, place in batch
        ]
        return generate_spectrograms(self.model, input_ids, attention_mask, voices, seeds=seeds)

    def _at_speed(self, spectrogram):
        if self.speed == 1:
            return spectrogram
        size = max(round(len(spectrogram) / self.speed), 1)
        return torch.nn.functional.interpolate(spectrogram.T[None], size=size, mode="linear")[0].T


def _faded(waveform):
    """Returns a piece without the silence at its ends, which rise and fall as a raised cosine."""
    waveform = np.asarray(waveform, dtype=np.float32)
    waveform = trimmed(waveform) if waveform.any() else waveform
    length = min(round(FADE_S * SAMPLING_RATE), len(waveform) // 2)
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(length) + 0.5) / max(length, 1))).astype(np.float32)
    ends = np.ones(len(waveform), np.float32)
    ends[:length], ends[len(ends) - length :] = ramp, ramp[::-1]
    return waveform * ends


def _join(pieces, waveforms, pause_s):
    """Returns the pieces of one text as one waveform, and the times of its sentences."""
    parts, sentences, position, last = [], [], 0, None
    for piece, waveform in zip(pieces, waveforms):
        start_s, end_s = (round(samples / SAMPLING_RATE, 3) for samples in (position, position + len(waveform)))
        if piece.sentence == last:
            sentences[-1] |= {"text": sentences[-1]["text"] + piece.text, "end_s": end_s}
        else:
            sentences.append({"text": piece.text, "start_s": start_s, "end_s": end_s})
        last = piece.sentence
        silence = np.zeros(round(PAUSES[piece.ends] * pause_s * SAMPLING_RATE), np.float32)
        parts += [waveform, silence]
        position += len(waveform) + len(silence)
    return np.concatenate(parts[:-1]), sentences


def at_loudness(waveform, loudness_db):
    """Returns a waveform at a loudness, or as near to it as its peaks allow: they stay 1 dB under full scale.

    Loudness is that of ITU-R BS.1770-4, in LUFS: weighted as the ear hears, and without pauses. It is measured in
    blocks of 0.4 s; a shorter waveform is repeated until it fills one.

    Args:
        waveform: float32 array of shape (samples,), 16 kHz.
        loudness_db: in LUFS. -23 is the level of European broadcasts (EBU R 128).
    """
    import torchaudio.functional

    peak = float(np.abs(waveform).max(initial=0))
    if not peak > 0:
        return waveform
    # torchaudio's filters cut off at full scale, which weighting may pass: measured at half of it.
    measured = torch.from_numpy(waveform / np.float32(2 * peak))
    measured = measured.repeat(-(-round(0.4 * SAMPLING_RATE) // len(measured)))
    found_db = torchaudio.functional.loudness(measured[None], SAMPLING_RATE).item() + 20 * np.log10(2 * peak)
    if not np.isfinite(found_db):  # nothing above the gate of -70 LUFS
        return waveform
    gain_db = min(loudness_db - found_db, PEAK_DB - 20 * np.log10(peak))
    return waveform * np.float32(10 ** (gain_db / 20))
