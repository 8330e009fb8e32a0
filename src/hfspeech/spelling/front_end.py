"""Text as a tokenizer can take it, and the characters of it that the tokenizer lacks."""

import collections
import functools
import unicodedata

from hfspeech.spelling.speller import spell_out

# A text is looked at for what is unknown in it, measured and turned into tokens, and that once in each pass.
_spelled_out = functools.lru_cache(maxsize=1 << 16)(spell_out)


class TextFrontEnd:
    """Turns text into what a tokenizer can take.

    Called with a text, it spells it out (`spell_out`), writes a capital in lower case where the tokenizer has only
    that, and makes every run of white space one space. Characters that are still unknown stay in the text.

    Args:
        tokenizer: a `SpeechT5Tokenizer`, or any tokenizer with an unknown token. `add_characters` puts a new one in
            its place: make a new front end then.
        language: code or English name of the language; see `spell_out`. Default: "en".
        spell_out: whether to put numbers, signs and abbreviations in words. Default: True.
    """

    def __init__(self, tokenizer, language="en", spell_out=True):
        self.tokenizer = tokenizer
        self.language = language
        self.spell_out = spell_out
        self._is_known = {}

    def __call__(self, text: str) -> str:
        text = _spelled_out(text, self.language) if self.spell_out else unicodedata.normalize("NFC", text)
        return " ".join("".join(map(self._in_vocabulary_case, text)).split())

    def unknown(self, text: str) -> list[str]:
        """Returns the characters of the prepared text that become the unknown token: in order, repeated.

        The tokenizer makes one unknown token of several such characters in a row, so counting tokens would not do.
        """
        return [character for character in self(text) if not self._knows(character)]

    def ids(self, text: str) -> list[int]:
        """Returns the tokens of the prepared text, the end token included."""
        return self.tokenizer(self(text)).input_ids

    def _in_vocabulary_case(self, character):
        lower = character.lower()
        if lower != character and not self._knows(character) and all(map(self._knows, lower)):
            return lower
        return character

    def _knows(self, character):
        if character not in self._is_known:
            self._is_known[character] = knows(self.tokenizer, character)
        return self._is_known[character]


def knows(tokenizer, character):
    """Returns whether a tokenizer can take a character as it stands."""
    return tokenizer.unk_token_id not in tokenizer(character, add_special_tokens=False).input_ids


def unknown_characters(front_end: TextFrontEnd, texts) -> collections.Counter:
    """Returns how often each character that the tokenizer does not have occurs in the prepared texts.

    Args:
        front_end: a `TextFrontEnd`.
        texts: texts as written; an iterable of str.

    Returns:
        collections.Counter: character to count; empty if the tokenizer can take all of it.
    """
    return collections.Counter(character for text in texts for character in front_end.unknown(text))


def unknown_report(counter: collections.Counter, limit: int = 12) -> str:
    """Returns part of a sentence about unknown characters, the most frequent first, or "none".

    >>> unknown_report(collections.Counter("łłłóó7"), limit=2)
    "'ł' 3 times, 'ó' 2 times and 1 more"

    Args:
        counter: what `unknown_characters` returned.
        limit: how many characters are named. Default: 12.
    """
    most = counter.most_common(limit)
    named = [f"{character!r} {'once' if count == 1 else f'{count} times'}" for character, count in most]
    more = len(counter) - len(named)
    return (", ".join(named) or "none") + (f" and {more} more" if more else "")
