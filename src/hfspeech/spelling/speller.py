"""Text as it is spoken: numbers, signs and abbreviations in words."""

import functools
import logging
import re
import unicodedata

from hfspeech.spelling.languages import CODES, CURRENCY_CODES, LANGUAGES, POINT_LANGUAGES, Language

logger = logging.getLogger(__name__)

_PLAIN = {
    **dict.fromkeys(map(ord, "“”„‟«»″"), '"'),
    **dict.fromkeys(map(ord, "‘’‚‛‹›`´′"), "'"),
    **dict.fromkeys(map(ord, "‐‑‒–−"), "-"),
    **dict.fromkeys(map(ord, "—―"), " - "),
    **dict.fromkeys(map(ord, "\u200b\ufeff\u00ad")),
    ord("…"): "...",
}
# Stands for a no-break space between digits, which groups them in every language, until the numbers are read.
_GROUP = "\0"
# Digits. Longer numbers are read digit by digit; grouped ones (1,000,000) are meant as numbers.
_LONGEST_CARDINAL = 7
_LONGEST_GROUPED = 36
# +49 30 1234567, (555) 123-4567, 030/1234567, 555-123-4567; not 500-1000 and not 01/02/2020.
_TELEPHONE = re.compile(
    r"(?<![\w.,+-])(?!\d\d([/-])\d\d\1\d)"
    r"(?:(?:\+\d{1,3}|\(\d+\)|0\d+)(?:[ /-]+(?:\(0\) ?)?\d{2,})+|\d{3}-\d{3}-\d{4})(?![\w-])"
)


def spell_out(text: str, language: str = "en") -> str:
    """Returns a text as it is spoken: numbers, signs and common abbreviations in words.

    >>> spell_out("Dr. Smith paid $5.20 on the 3rd — 12% less.")
    'Doctor Smith paid five dollars and twenty cents on the third - twelve percent less.'
    >>> spell_out("Um 14:30 Uhr kosten 1.000 Stück z. B. 2,5 €.", "de")
    'Um vierzehn Uhr dreißig kosten eintausend Stück zum Beispiel zwei Komma fünf Euro.'

    In every language: Unicode form NFC; typographic quotes, dashes, ellipses and spaces become plain ones; runs of
    white space become one space, and none is left at the ends. Where num2words knows the language, numbers become
    words, with the decimal sign and the thousands separators of that language. Where there is a table (English,
    German, French, Spanish, Italian, Dutch, Polish, Portuguese; a short one for Swedish, Danish, Norwegian), so do
    ordinals, times, amounts of money, `% & + = @ #`, degrees and abbreviations. Numbers with a leading zero, numbers
    of more than seven digits without separators, and telephone numbers are read digit by digit. Words are not made to
    agree with the sentence: case and gender are those of the dictionary ("dwa", never "dwie").

    A number that num2words cannot read stays as it is, and so do all numbers of a language that it does not know.
    A text without numbers, signs and abbreviations only gets its plain characters; doing it twice changes nothing.

    Args:
        text: one sentence or more.
        language: code or English name of the language ("de", "pt-BR", "german"). Default: "en".

    Returns:
        The text in words. Case is kept.
    """
    return _speller(language)(text)


@functools.cache
def _speller(language):
    return _Speller(language)


class _Speller:
    """The rules of one language, compiled once: text in, spoken text out."""

    def __init__(self, language):
        code, _, region = _language_code(language).partition("-")
        point = code in POINT_LANGUAGES
        self.table = table = LANGUAGES.get(code) or Language(*(".", ",") if point else (",", ". "))
        self.converter = _converter(code, region)

        decimal, group = re.escape(table.decimal), f"[{re.escape(table.thousands)}{_GROUP}]"
        number = rf"(?<!\d)(?:(?:\d{{1,3}}(?:{group}\d{{3}})+(?!\d)|\d+)(?:{decimal}\d+)?|(?<!\w){decimal}\d+)(?!\d)"
        self.number = re.compile(rf"((?:^|(?<=[\s(]))-)?({number})")
        self.groups = re.compile(group)
        self.decade = re.compile(r"'?(?<!\d)((?:\d\d)?\d0)s\b")
        self.time = _time_pattern(table.time)
        self.ordinals = [
            (re.compile(rf"(?<![\d.,])(\d{{1,12}})(?:{suffix})(?!\w)"), ending)
            for suffix, ending in table.ordinals.items()
        ]
        self.dotted_ordinals = [
            (re.compile(rf"{before}(?<![\d.,])(\d{{1,3}})\.(?=\s(?:{after}))"), ending)
            for before, after, ending in table.dotted_ordinals
        ]
        self.signs = {sign: sign for sign in table.currencies}
        self.signs |= {code: sign for code, sign in CURRENCY_CODES.items() if sign in table.currencies}
        sign = "|".join(map(re.escape, sorted(self.signs, key=len, reverse=True)))
        magnitude = rf"(?:\s({table.magnitudes})\b)?" if table.magnitudes else "()"
        self.money = re.compile(
            rf"((?:^|(?<=[\s(]))-)?(?:(?<!\w)({sign})\s?({number}){magnitude}|({number})\s?({sign})(?!\w))"
        )
        abbreviations = table.abbreviations | {
            key: words for key, words in table.symbols.items() if key.endswith(" 1")
        }
        self.abbreviations = [(_abbreviation(key), key, words) for key, words in abbreviations.items()]
        plurals = {sign: forms[0].split("|")[-1] for sign, forms in table.currencies.items() if not sign.isalpha()}
        symbols = sorted({**plurals, **table.symbols}.items(), key=lambda item: -len(item[0]))
        self.symbols = [(re.compile(re.escape(key)), words) for key, words in symbols if key not in abbreviations]

    def __call__(self, text):
        table = self.table
        text = unicodedata.normalize("NFC", text)
        if table.until:
            text = re.sub(r"(?<=\d)\s?–\s?(?=[\d$€£])", f" {table.until} ", text)
        text = re.sub(r"(?<=\d)[\xa0\u2007\u2009\u202f](?=\d{3}(?!\d))", _GROUP, text.replace(_GROUP, ""))
        text = " ".join(text.translate(_PLAIN).split())
        for pattern, key, words in self.abbreviations:
            text = pattern.sub(functools.partial(_expand, key, words), text)
        if self.converter and re.search(r"\d", text):
            text = self._numbers(text)
        for pattern, words in self.symbols:
            text = pattern.sub(functools.partial(_in_place, words), text)
        return " ".join(text.replace(_GROUP, " ").split())

    def _numbers(self, text):
        text = _TELEPHONE.sub(self._telephone, text)
        text = self.time.sub(self._time, text)
        if self.table.currencies:
            text = self.money.sub(self._money, text)
        for pattern, ending in self.ordinals:
            text = pattern.sub(functools.partial(self._ordinal, ending), text)
        for pattern, ending in self.dotted_ordinals:
            text = pattern.sub(functools.partial(self._dotted_ordinal, ending), text)
        if self.table.decades:
            text = self.decade.sub(self._decade, text)
        text = self.number.sub(self._number, text)
        for pattern, words in self.table.amendments.items():
            text = re.sub(pattern, words, text)
        return text

    def say(self, number, to="cardinal"):
        """Returns a number in words, or None when num2words fails, which it does in half a dozen ways."""
        try:
            words = self.converter(number, to=to)
        except Exception as error:
            logger.debug("num2words cannot read %s as %s: %r", number, to, error)
            return None
        # "Twelve thousand, three hundred": num2words' commas would be heard as pauses.
        return " ".join(words.replace(",", "").split()) or None

    def digits(self, text):
        return _joined([self.say(unicodedata.digit(digit)) for digit in text])

    def cardinal(self, token, year=False):
        whole, _, fraction = self.groups.sub("", token).partition(self.table.decimal)
        if fraction and not self.table.point:
            return self.say(float(f"{whole or 0}.{fraction}"))
        grouped = self.groups.search(token)
        longest = _LONGEST_GROUPED if grouped else _LONGEST_CARDINAL
        if len(whole) > longest or len(whole) > 1 and unicodedata.digit(whole[0]) == 0:
            words = self.digits(whole)
        elif year and self.table.years and not fraction and not grouped and 1100 <= int(whole) <= 2099:
            words = self.say(int(whole), "year")
        else:
            words = self.say(int(whole or 0))
        return _joined([words, self.table.point, self.digits(fraction)]) if fraction else words

    def _number(self, match):
        minus, token = match.groups()
        words = self.cardinal(token, year=not minus)
        if minus and words:
            # Czech num2words, for one, cannot read a negative number.
            words = f"{self.table.minus} {words}" if self.table.minus else self._negative(token) or f"-{words}"
        return _in_place(words, match)

    def _negative(self, token):
        whole, _, fraction = self.groups.sub("", token).partition(self.table.decimal)
        if len(whole) > _LONGEST_CARDINAL:
            return None
        return self.say(-float(f"{whole or 0}.{fraction}") if fraction else -int(whole))

    def _telephone(self, match):
        # Not 12 345 678, where spaces group a number.
        groups = re.findall(r"\d+", match[0])
        if sum(map(len, groups)) < _LONGEST_CARDINAL or self.number.fullmatch(match[0]):
            return match[0]
        words = _joined([self.digits(group) for group in groups], ", ")
        return words and ("+" if match[0][0] == "+" else "") + words or match[0]

    def _time(self, match):
        hour, minute = match[1], match[2] or match[3]
        with_minutes, without, zero, _ = self.table.time
        h, m = self.say(int(hour)), self.say(int(minute or 0))
        if not (h and m):
            return match[0]
        if not int(minute or 0):
            return without.format(h=h)
        return with_minutes.format(h=h, m=f"{zero} {m}".strip() if minute[0] == "0" else m)

    def _money(self, match):
        minus, before, first, magnitude, second, after = match.groups()
        token = first or second
        forms, hundredths = self.table.currencies[self.signs[before or after]]
        whole, _, fraction = self.groups.sub("", token).partition(self.table.decimal)
        if len(whole) > _LONGEST_GROUPED:
            words = _joined([self.cardinal(token), forms.split("|")[-1]])
        elif magnitude:
            words = _joined([self.cardinal(token), magnitude, forms.split("|")[-1]])
        elif len(fraction) == 2:
            amount, cents = int(whole or 0), int(fraction)
            parts = [self._counted(amount, forms)] if amount or not cents else []
            parts += [self._counted(cents, hundredths)] if cents else []
            words = _joined(parts, f" {self.table.symbols['&']} ")
        elif fraction:
            words = _joined([self.cardinal(token), forms.split("|")[-1]])
        else:
            words = self._counted(int(whole), forms)
        return _in_place(words and (f"{self.table.minus} {words}" if minus else words), match)

    def _counted(self, number, forms):
        one, *few, many = forms.split("|")
        if number == 1:
            return one
        words = self.say(number)
        for ending, other in self.table.before_noun.items():
            words = words and re.sub(ending, other, words)
        few = few and number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14) and few[0]
        return _joined([words, few or many])

    def _ordinal(self, ending, match):
        words = self.say(int(match[1]), "ordinal")
        return _in_place(words and re.sub(*ending, words), match) if ending[0] else _in_place(words, match)

    def _dotted_ordinal(self, ending, match):
        words = self.say(int(match[2]), "ordinal")
        return f"{match[1]} {words}{ending}".lstrip() if words else match[0]

    def _decade(self, match):
        words = self.say(int(match[1]), "year" if len(match[1]) == 4 else "cardinal")
        return _in_place(words and (f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"), match)


def _language_code(language):
    code = language.strip().lower().replace("_", "-")
    if len(code.partition("-")[0]) > 3:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = TO_LANGUAGE_CODE.get(code, code)
    start, *rest = code.split("-")
    return "-".join([CODES.get(start, start), *rest])


def _converter(code, region):
    """Returns num2words for one language, or None: it would take an unknown "tel" for "te"."""
    from num2words import CONVERTER_CLASSES, num2words

    for name in (f"{code}_{region.upper()}", code):
        if name in CONVERTER_CLASSES:
            return functools.partial(num2words, lang=name)
    return None


def _time_pattern(time):
    _, without, _, letter = time
    minutes = r"([0-5]\d)"
    letter = rf"\s?{letter}(?:\s?{minutes})?(?!\w)" if letter else "(?!)()"
    named = without.replace("{h}", "").strip()
    named = rf"(?:\s{named}\b)?" if named else ""
    return re.compile(rf"(?<![\d:.,])([01]?\d|2[0-4])(?::{minutes}(?![\d:])|{letter}){named}")


def _abbreviation(key):
    after = {" A": r"(?=\s?[^\W\d_a-zß-ÿ])", " 1": r"(?=\s?\d)"}.get(key[-2:], "")
    key = key[:-2] if after else key
    pattern = re.escape(key).replace(r"\ ", r"\s?")
    if key[0].islower():
        pattern = f"[{key[0]}{key[0].upper()}]{pattern[1:]}"
    return re.compile(rf"(?<![\w.]){pattern}{after}" + (r"(?!\w)" if key[-1].isalnum() else ""))


def _expand(key, words, match):
    if match[0][0].isupper() and key[0].islower():
        words = words[0].upper() + words[1:]
    # The full stop of an abbreviation at the very end also ends the sentence.
    if match[0].endswith(".") and match.end() == len(match.string):
        words += "."
    return _in_place(words, match)


def _in_place(words, match):
    """Returns what takes the place of a match: `words` with a space on each side where a word or sign touches them."""
    if words is None:
        return match[0]
    before, after = match.string[: match.start()][-2:], match.string[match.end() :][:1]
    left = before and (before[-1].isalnum() or before[-1] in "+=%°&@#" or re.fullmatch(r"\d[.,:]", before))
    return f"{' ' if left else ''}{words}{' ' if after and (after.isalnum() or after in '+=&@#') else ''}"


def _joined(parts, separator=" "):
    """Returns the parts as one text, or None if one of them is None."""
    return None if None in parts else separator.join(parts)
