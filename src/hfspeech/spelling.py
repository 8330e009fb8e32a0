"""The text side of speech synthesis: text as it is spoken, and the characters that a tokenizer can take."""

import collections
import functools
import logging
import re
import unicodedata
from dataclasses import dataclass, field

from .errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Language:
    """How one language writes, and reads aloud, what is not a word. The defaults suit a language without a table.

    A key of `abbreviations` or `symbols` that ends in " A" holds only before a capital, in " 1" only before a digit.
    A lower-case abbreviation is also found with a capital in front, and its spaces may be missing.
    """

    decimal: str = ","
    thousands: str = ". "
    point: str = ""  # The name of the decimal sign; without it num2words reads decimals.
    minus: str = ""
    until: str = ""  # 10–20
    years: bool = False  # 1100 to 2099 are read in hundreds: nineteen eighty-four.
    decades: bool = False  # 1980s
    # A time with minutes, one without, what stands for the zero of 9:05, and a letter that may take the colon's place.
    time: tuple[str, str, str, str] = ("{h} {m}", "{h}", "", "")
    # What follows the digits of an ordinal: the ending to replace, and with what.
    ordinals: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Ordinals written with a full stop, which may as well end a sentence: what precedes, what follows, ending.
    dotted_ordinals: tuple[tuple[str, str, str], ...] = ()
    before_noun: dict[str, str] = field(default_factory=dict)
    amendments: dict[str, str] = field(default_factory=dict)
    magnitudes: str = ""  # $5 million
    # Sign: "one euro|[2 to 4|]many", then the same of the hundredth.
    currencies: dict[str, tuple[str, str]] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    abbreviations: dict[str, str] = field(default_factory=dict)


def _pairs(text):
    return dict(pair.split("=", 1) for pair in text.split("; "))


def _signs(text):
    return dict(zip(("%", "&", "+", "=", "@", "#", "# 1", "°", "°C", "°F"), text.split("; ")))


_GERMAN_MONTHS = "Januar|Jänner|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember"
_ROMANCE_ORDINALS = {r"\.?º": ("", ""), r"\.?ª": (r"o\b", "a")}

_LANGUAGES = {
    "en": _Language(
        ".", ",", "point", "minus", "to", years=True, decades=True,
        time=("{h} {m}", "{h} o'clock", "oh", ""),
        ordinals={"st|nd|rd|th": ("", "")},
        amendments={r" o'clock(?= ?[ap]\.?m\b)": ""},
        magnitudes="thousand|million|billion|trillion",
        currencies={
            "$": ("one dollar|dollars", "one cent|cents"), "€": ("one euro|euros", "one cent|cents"),
            "£": ("one pound|pounds", "one penny|pence"), "₹": ("one rupee|rupees", "one paisa|paise"),
            "¥": ("one yen|yen", "one sen|sen"), "kr": ("one krona|kronor", "one ore|ore"),
        },
        symbols=_signs("percent; and; plus; equals; at; hash; number; degrees; degrees Celsius; degrees Fahrenheit"),
        abbreviations=_pairs(
            "Mr.=Mister; Mrs.=Missus; Ms.=Miss; Dr. A=Doctor; Dr.=Drive; Prof.=Professor; St. A=Saint; St.=Street; "
            "Ave.=Avenue; Blvd.=Boulevard; Mt. A=Mount; Jr.=Junior; Sr.=Senior; Gov. A=Governor; Gen. A=General; "
            "Col. A=Colonel; Capt. A=Captain; Lt. A=Lieutenant; Sgt. A=Sergeant; Rev. A=Reverend; Ltd.=Limited; "
            "Inc.=Incorporated; Corp.=Corporation; no. 1=number; vs.=versus; etc.=et cetera; "
            "e.g.=for example; i.e.=that is; approx.=approximately"
        ),
    ),
    "de": _Language(
        ",", ".", "Komma", "minus", "bis", years=True,
        time=("{h} Uhr {m}", "{h} Uhr", "", ""),
        dotted_ordinals=(
            (r"\b([Aa]m|[Vv]om|[Zz]u[mr]|[Ii]m|[Bb]eim|[Dd]e[mns]|[Ss]eit|[Aa]b|[Bb]is)\s", r"\w", "n"),
            (r"\b([Dd]er|[Dd]ie|[Dd]as)\s", r"\w", ""),
            ("()", _GERMAN_MONTHS, "r"),
        ),
        before_noun={"eins$": "ein"},
        amendments={r"eins Uhr": "ein Uhr"},
        currencies={
            "€": ("ein Euro|Euro", "ein Cent|Cent"), "$": ("ein Dollar|Dollar", "ein Cent|Cent"),
            "£": ("ein Pfund|Pfund", "ein Penny|Pence"), "CHF": ("ein Franken|Franken", "ein Rappen|Rappen"),
            "kr": ("eine Krone|Kronen", "ein Öre|Öre"),
        },
        symbols=_signs("Prozent; und; plus; gleich; at; Raute; Nummer; Grad; Grad Celsius; Grad Fahrenheit"),
        abbreviations=_pairs(
            "z. B.=zum Beispiel; d. h.=das heißt; u. a.=unter anderem; z. T.=zum Teil; usw.=und so weiter; "
            "bzw.=beziehungsweise; ca.=circa; evtl.=eventuell; ggf.=gegebenenfalls; inkl.=inklusive; vgl.=vergleiche; "
            "o. Ä.=oder Ähnliches; u. Ä.=und Ähnliches; v. Chr.=vor Christus; n. Chr.=nach Christus; Dr.=Doktor; "
            "Prof.=Professor; Hr.=Herr; Hrn.=Herrn; Fr. A=Frau; St. A=Sankt; Nr.=Nummer; Str.=Straße; "
            "Mio.=Millionen; Mrd.=Milliarden; Jh.=Jahrhundert"
        ),
    ),
    "fr": _Language(
        ",", " ", "virgule", "moins", "à",
        time=("{h} heures {m}", "{h} heures", "", "h"),
        ordinals={"ère|re": ("premier$", "première"), "er|i?ème|nde?|e": ("", "")},
        amendments={r"\bun heures": "une heure"},
        currencies={
            "€": ("un euro|euros", "un centime|centimes"), "$": ("un dollar|dollars", "un cent|cents"),
            "£": ("une livre|livres", "un penny|pence"), "CHF": ("un franc|francs", "un centime|centimes"),
        },
        symbols=_signs(
            "pour cent; et; plus; égale; arobase; dièse; numéro; degrés; degrés Celsius; degrés Fahrenheit"
        ),
        abbreviations=_pairs(
            "M. A=Monsieur; MM. A=Messieurs; Mme=Madame; Mmes=Mesdames; Mlle=Mademoiselle; Dr=Docteur; Dr.=Docteur; "
            "p. ex.=par exemple; c.-à-d.=c'est-à-dire; etc.=et cetera; n° 1=numéro; nº 1=numéro; env.=environ; "
            "av. J.-C.=avant Jésus-Christ; apr. J.-C.=après Jésus-Christ"
        ),
    ),
    "es": _Language(
        ",", ". ", "coma", "menos", "a",
        time=("{h} y {m}", "{h}", "", ""),
        ordinals=_ROMANCE_ORDINALS,
        before_noun={"veintiuno$": "veintiún", "uno$": "un"},
        currencies={
            "€": ("un euro|euros", "un céntimo|céntimos"), "$": ("un dólar|dólares", "un centavo|centavos"),
            "£": ("una libra|libras", "un penique|peniques"),
        },
        symbols=_signs(
            "por ciento; y; más; igual a; arroba; almohadilla; número; grados; grados Celsius; grados Fahrenheit"
        ),
        abbreviations=_pairs(
            "Sr.=señor; Sra.=señora; Srta.=señorita; Sres.=señores; Dr.=doctor; Dra.=doctora; D. A=don; Dña.=doña; "
            "Ud.=usted; Uds.=ustedes; Prof.=profesor; p. ej.=por ejemplo; etc.=etcétera; EE. UU.=Estados Unidos; "
            "Av.=avenida; núm.=número; n.º=número; pág.=página; a. C.=antes de Cristo; d. C.=después de Cristo"
        ),
    ),
    "it": _Language(
        ",", ".", "virgola", "meno", "a",
        time=("{h} e {m}", "{h}", "", ""),
        ordinals={r"\.?º": ("", ""), r"\.?ª": ("o$", "a")},
        currencies={
            "€": ("un euro|euro", "un centesimo|centesimi"), "$": ("un dollaro|dollari", "un centesimo|centesimi"),
            "£": ("una sterlina|sterline", "un penny|pence"),
        },
        symbols=_signs(
            "per cento; e; più; uguale a; chiocciola; cancelletto; numero; gradi; gradi Celsius; gradi Fahrenheit"
        ),
        abbreviations=_pairs(
            "Sig.=signor; Sig.ra=signora; Sig.na=signorina; Dott.=dottor; Dott.ssa=dottoressa; Prof.=professor; "
            "Prof.ssa=professoressa; Ing. A=ingegner; Avv. A=avvocato; ecc.=eccetera; p. es.=per esempio; "
            "ad es.=ad esempio; n. 1=numero; n.º=numero; pag.=pagina; a. C.=avanti Cristo; d. C.=dopo Cristo"
        ),
    ),
    "nl": _Language(
        ",", ".", "komma", "min", "tot", years=True,
        time=("{h} uur {m}", "{h} uur", "", ""),
        ordinals={"ste|de|e": ("", "")},
        amendments={"één uur": "een uur"},
        currencies={
            "€": ("een euro|euro", "een cent|cent"), "$": ("een dollar|dollar", "een cent|cent"),
            "£": ("een pond|pond", "een penny|pence"),
        },
        symbols=_signs(
            "procent; en; plus; is; apenstaartje; hekje; nummer; graden; graden Celsius; graden Fahrenheit"
        ),
        abbreviations=_pairs(
            "dhr.=de heer; mevr.=mevrouw; mw.=mevrouw; dr.=dokter; prof.=professor; bijv.=bijvoorbeeld; "
            "bv.=bijvoorbeeld; d.w.z.=dat wil zeggen; o.a.=onder andere; enz.=enzovoort; m.b.t.=met betrekking tot; "
            "i.p.v.=in plaats van; t/m=tot en met; nr.=nummer; blz.=bladzijde; ca.=circa; St. A=Sint"
        ),
    ),
    "pl": _Language(
        ",", " .", "przecinek", "minus", "do",
        dotted_ordinals=(("()", "[a-ząćęłńóśźż]", ""),),
        currencies={
            "zł": ("jeden złoty|złote|złotych", "jeden grosz|grosze|groszy"),
            "€": ("jedno euro|euro|euro", "jeden cent|centy|centów"),
            "$": ("jeden dolar|dolary|dolarów", "jeden cent|centy|centów"),
            "£": ("jeden funt|funty|funtów", "jeden pens|pensy|pensów"),
        },
        symbols=_signs(
            "procent; i; plus; równa się; małpa; krzyżyk; numer; stopni; stopni Celsjusza; stopni Fahrenheita"
        ),
        abbreviations=_pairs(
            "np.=na przykład; m.in.=między innymi; tzn.=to znaczy; tj.=to jest; tzw.=tak zwany; itd.=i tak dalej; "
            "itp.=i tym podobne; dr=doktor; prof.=profesor; św.=święty; ul.=ulica; al.=aleja; nr=numer; "
            "ok.=około; wg=według; godz.=godzina"
        ),
    ),
    "pt": _Language(
        ",", ". ", "vírgula", "menos", "a",
        time=("{h} e {m}", "{h} horas", "", "h"),
        ordinals=_ROMANCE_ORDINALS,
        amendments={r"\bum horas": "uma hora", r"\bdois horas": "duas horas"},
        currencies={
            "€": ("um euro|euros", "um cêntimo|cêntimos"), "$": ("um dólar|dólares", "um centavo|centavos"),
            "R$": ("um real|reais", "um centavo|centavos"), "£": ("uma libra|libras", "um pêni|pence"),
        },
        symbols=_signs(
            "por cento; e; mais; igual a; arroba; cardinal; número; graus; graus Celsius; graus Fahrenheit"
        ),
        abbreviations=_pairs(
            "Sr.=senhor; Sra.=senhora; Srta.=senhorita; Dr.=doutor; Dra.=doutora; Prof.=professor; "
            "Profa.=professora; p. ex.=por exemplo; etc.=et cetera; Av.=avenida; n.º=número; nº 1=número; "
            "pág.=página; a. C.=antes de Cristo; d. C.=depois de Cristo"
        ),
    ),
    "sv": _Language(
        ",", " .", "komma", "minus", "till",
        ordinals={":[ae]": ("", "")},
        currencies={
            "kr": ("en krona|kronor", "ett öre|öre"), "€": ("en euro|euro", "en cent|cent"),
            "$": ("en dollar|dollar", "en cent|cent"), "£": ("ett pund|pund", "en penny|pence"),
        },
        symbols=_signs("procent; och; plus; är lika med; snabel-a; nummer; nummer; grader; grader Celsius"),
        abbreviations=_pairs("t. ex.=till exempel; bl. a.=bland annat; d. v. s.=det vill säga; osv.=och så vidare"),
    ),
    "da": _Language(
        ",", ".", "komma", "minus", "til",
        dotted_ordinals=(("()", "[a-zæøå]", ""),),
        currencies={
            "kr": ("en krone|kroner", "en øre|øre"), "€": ("en euro|euro", "en cent|cent"),
            "$": ("en dollar|dollar", "en cent|cent"), "£": ("et pund|pund", "en penny|pence"),
        },
        symbols=_signs("procent; og; plus; er lig med; snabel-a; nummer; nummer; grader; grader Celsius"),
        abbreviations=_pairs("f. eks.=for eksempel; bl. a.=blandt andet; dvs.=det vil sige; osv.=og så videre"),
    ),
    "no": _Language(
        ",", " .", "komma", "minus", "til",
        dotted_ordinals=(("()", "[a-zæøå]", ""),),
        currencies={
            "kr": ("en krone|kroner", "ett øre|øre"), "€": ("en euro|euro", "en cent|cent"),
            "$": ("en dollar|dollar", "en cent|cent"), "£": ("ett pund|pund", "en penny|pence"),
        },
        symbols=_signs("prosent; og; pluss; er lik; krøllalfa; nummer; nummer; grader; grader Celsius"),
        abbreviations=_pairs("f. eks.=for eksempel; bl. a.=blant annet; dvs.=det vil si; osv.=og så videre"),
    ),
}  # fmt: skip

# Languages without a table that write 3.14 and 1,000 as English does.
_POINT_LANGUAGES = ("am", "bn", "cy", "he", "hi", "ja", "kn", "ko", "te", "th", "zh")
# num2words goes by the country for Kazakh; it has one Norwegian.
_CODES = {"nb": "no", "nn": "no", "kk": "kz"}
_CURRENCY_CODES = {
    "EUR": "€", "USD": "$", "US$": "$", "GBP": "£", "INR": "₹", "JPY": "¥", "BRL": "R$", "PLN": "zł",
    "SEK": "kr", "NOK": "kr", "DKK": "kr", "kr.": "kr",
}  # fmt: skip

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
        point = code in _POINT_LANGUAGES
        self.table = table = _LANGUAGES.get(code) or _Language(*(".", ",") if point else (",", ". "))
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
        self.signs |= {code: sign for code, sign in _CURRENCY_CODES.items() if sign in table.currencies}
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
    return "-".join([_CODES.get(start, start), *rest])


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
        text = spell_out(text, self.language) if self.spell_out else unicodedata.normalize("NFC", text)
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
            self._is_known[character] = _knows(self.tokenizer, character)
        return self._is_known[character]


def _knows(tokenizer, character):
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


def add_characters(model, processor, characters) -> None:
    """Adds characters to a SpeechT5 tokenizer, and a row for each to the model's text embedding.

    `tokenizer.add_tokens` is not the way: it cuts the text at an added character, and the piece after it starts with a
    word boundary. Here the characters become pieces of the sentencepiece model. No old token gets another id: tokens
    that stood after the pieces (SpeechT5's <mask> and <ctc_blank>) become control pieces in their old place, and the
    characters come after them. So texts of old characters keep their ids, embeddings and spectrograms, and data that
    is already tokenized stays valid.

    A new row starts as a copy of that of the letter in the other case, or of the letter without its mark (é as e,
    ł as l); of the mean over all letters if there is none; for what is not a letter, of the space. Rows that the
    embedding has beyond the tokenizer's length are used first.

    Characters already known are skipped. One that the tokenizer writes as others (½ as 1⁄2) adds those. Saved with
    `model.save_pretrained` and `processor.save_pretrained`, both load with stock transformers.

    Args:
        model: a `SpeechT5ForTextToSpeech`; its text embedding and `config.vocab_size` change in place.
        processor: a `SpeechT5Processor`; its `tokenizer` is replaced.
        characters: iterable of str, each one character in Unicode form NFC.

    Raises:
        UserError: an entry is white space or not exactly one character, or the tokenizer does not take it.
    """
    import torch

    tokenizer = processor.tokenizer
    new = _new_pieces(tokenizer, characters)
    if not new:
        return
    old_pieces = tokenizer.get_vocab()
    extended = _with_pieces(tokenizer, new)
    for character in new:
        if not _knows(extended, character):
            raise UserError(f"The tokenizer cannot take {character!r} (U+{ord(character):04X}). Leave it out.")

    embedding = model.get_input_embeddings()
    if len(extended) > embedding.num_embeddings:
        embedding = model.resize_token_embeddings(len(extended), mean_resizing=False)
    letters = [index for piece, index in old_pieces.items() if len(piece) == 1 and piece.isalpha()]
    with torch.no_grad():
        for character in new:
            relative = _relative(character, old_pieces)
            like = [relative] if relative is not None else letters or [tokenizer.unk_token_id]
            embedding.weight[extended.convert_tokens_to_ids(character)] = embedding.weight[like].mean(0)
    processor.tokenizer = extended


def _new_pieces(tokenizer, characters):
    new = {}
    for entry in characters:
        character = unicodedata.normalize("NFC", entry)
        if len(character) != 1 or character.isspace():
            what = "white space" if entry.isspace() else f"{len(character)} characters"
            raise UserError(f"Cannot add {entry!r} to the tokenizer: it is {what}. Give single characters, as in ł.")
        new |= {c: None for c in tokenizer.sp_model.normalize(character) if c != "▁" and not _knows(tokenizer, c)}
    return list(new)


def _with_pieces(tokenizer, characters):
    """Returns a copy of a sentencepiece tokenizer that has the characters as its last pieces."""
    import tempfile
    from pathlib import Path

    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    piece_type = sentencepiece_model_pb2.ModelProto.SentencePiece
    rarest = min((piece.score for piece in proto.pieces if piece.type == piece_type.NORMAL), default=0.0)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    for index in range(len(proto.pieces), max(added, default=-1) + 1):
        proto.pieces.add(piece=added.get(index, f"<unused{index}>"), score=0.0, type=piece_type.CONTROL)
    for character in characters:
        proto.pieces.add(piece=character, score=rarest, type=piece_type.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / tokenizer.vocab_files_names["vocab_file"]).write_bytes(proto.SerializeToString())
        extended = type(tokenizer).from_pretrained(folder)
    # What loading noted about the folder would be saved with the tokenizer.
    for key in extended.init_kwargs.keys() - tokenizer.init_kwargs.keys():
        del extended.init_kwargs[key]
    extended.name_or_path = tokenizer.name_or_path
    return extended


def _relative(character, pieces):
    """Returns the row of the piece that a new character most resembles, or None for a letter without any."""
    if unicodedata.category(character)[0] not in "LM":
        return pieces.get("▁")
    # By name, because a stroke does not decompose: LATIN SMALL LETTER L WITH STROKE.
    name = unicodedata.name(character, "").split(" WITH ")[0]
    try:
        plain = unicodedata.lookup(name)
    except KeyError:
        plain = character
    for candidate in (character.swapcase(), unicodedata.normalize("NFKD", character)[0], plain):
        for form in (candidate, candidate.swapcase()):
            if form in pieces:
                return pieces[form]
    return None
