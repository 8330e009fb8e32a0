"""Text on both ends: the tokens a model learns to write, and what counts as the same word when it is scored."""

import re
import unicodedata
from collections.abc import Callable

from .errors import UserError, nearest

NORMALIZERS = ("none", "basic", "english", "marks", "auto")
TIMESTAMP = re.compile(r"<\|(\d+\.\d\d)\|>")


def normalizer(name: str, language: str | None = None, tokenizer=None) -> Callable[[str], str]:
    """Returns the function that is laid over prediction and reference alike before they are compared.

    The names:

    - `none`: the text as written. Case and punctuation count.
    - `basic`: Whisper's normaliser for every language. Lower case; brackets and what they hold are removed;
      punctuation, symbols and *combining marks* become spaces. That cuts words of Hindi, Bengali, Thai and of vowelled
      Arabic into pieces; use `marks` for them.
    - `marks`: `basic`, but combining marks (Unicode classes Mn and Mc) stay on the letter that carries them.
    - `english`: Whisper's normaliser for English. On top of `basic` it drops accents and "uh", writes contractions
      out, British spelling as American, and numbers as digits. **It joins digits that are spoken one by one**: "four
      two nine" becomes "429", which is one word instead of three, and one wrong digit makes the whole string wrong.
      Score digit strings with `basic`.
    - `auto`: `english` when `language` is English, `marks` otherwise.

    Unicode: every result is in form NFC, so two ways to encode one visible character never count as an error, with
    `none` neither. `basic` and `marks` first apply NFKC, as Whisper does, which also unites full-width with ordinary
    letters and ligatures with their letters. `english` applies NFKD, to take accents off. Runs of white space become
    one space, and none is left at the ends.

    Args:
        name: one of the five names.
        language: code or English name of the language ("en", "en-GB", "english"); only `auto` looks at it.
        tokenizer: a Whisper tokenizer; only `english` looks at it. The table of British spellings is not part of
            transformers but of the model: `normalizer.json`, held by the tokenizer as `english_spelling_normalizer`.
            Without a tokenizer, or with one that has no table, spellings are left as they are, and "colour" for
            "color" counts as an error.

    Returns:
        A function from text to text, whose `__name__` is the normaliser in use (never `auto`).

    Raises:
        UserError: there is no normaliser of that name.

    Source: `transformers/models/whisper/english_normalizer.py`; appendix C of the Whisper paper (arXiv:2212.04356).
    """
    if name not in NORMALIZERS:
        raise UserError(
            f"There is no normalizer called {name!r}.{nearest(name, NORMALIZERS)} "
            f"Choose one of {', '.join(NORMALIZERS)}."
        )
    if name == "auto":
        name = "english" if _is_english(language) else "marks"
    clean = _cleaner(name, tokenizer)

    def normalize(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", clean(text)).split())

    normalize.__name__ = name
    return normalize


def _cleaner(name, tokenizer):
    if name == "none":
        return str
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "english":
        return EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    basic = BasicTextNormalizer()
    if name == "marks":
        basic.clean = _remove_symbols_but_not_marks
    return basic


def _remove_symbols_but_not_marks(text):
    import regex

    # Marks and joiners that follow a space or a symbol have no letter to stand on: left alone, each would be a word.
    return regex.sub(r"(?:[\p{P}\p{S}\p{Me}\s]|^)[\p{M}\p{Cf}]*", " ", unicodedata.normalize("NFKC", text))


def _is_english(language):
    return (language or "").lower().replace("_", "-").split("-")[0] in ("en", "english")


def label_ids(tokenizer, text, duration_s):
    """Returns the tokens that Whisper learns to write for one text; see `labels_of`."""
    return labels_of(tokenizer, [text], [duration_s])[0]


def labels_of(tokenizer, texts, durations_s):
    """Returns the tokens that Whisper learns to write for each text: prefix, text, end; without the start token.

    With timestamps on (`tokenizer.predict_timestamps`), a text that has none gets the start and end of its recording,
    the end at most the tokenizer's last timestamp.

    Args:
        tokenizer: a Whisper tokenizer, its prefix tokens set.
        texts: list of str.
        durations_s: list of float, the recordings' seconds.

    Returns:
        list of lists of int.
    """
    if tokenizer.predict_timestamps:
        stamps = (TIMESTAMP.fullmatch(token) for token in tokenizer.get_added_vocab())
        last_s = max((float(stamp[1]) for stamp in stamps if stamp), default=30.0)
        texts = [_with_timestamps(text, min(seconds, last_s)) for text, seconds in zip(texts, durations_s)]
    labels = tokenizer(texts).input_ids
    # The model shifts the labels right and puts decoder_start_token_id in front, so a second one must not stay here.
    # (bos_token_id is another token, <|endoftext|>.)
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    return [ids[1:] if ids[0] == start else ids for ids in labels]


def _with_timestamps(text, end_s):
    if text.startswith("<|"):
        return text
    return f"<|0.00|>{text if text.startswith(' ') else ' ' + text}<|{round(end_s / 0.02) * 0.02:.2f}|>"
