"""How languages write, and read aloud, what is not a word."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
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

LANGUAGES = {
    "en": Language(
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
    "de": Language(
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
    "fr": Language(
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
    "es": Language(
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
    "it": Language(
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
    "nl": Language(
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
    "pl": Language(
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
    "pt": Language(
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
    "sv": Language(
        ",", " .", "komma", "minus", "till",
        ordinals={":[ae]": ("", "")},
        currencies={
            "kr": ("en krona|kronor", "ett öre|öre"), "€": ("en euro|euro", "en cent|cent"),
            "$": ("en dollar|dollar", "en cent|cent"), "£": ("ett pund|pund", "en penny|pence"),
        },
        symbols=_signs("procent; och; plus; är lika med; snabel-a; nummer; nummer; grader; grader Celsius"),
        abbreviations=_pairs("t. ex.=till exempel; bl. a.=bland annat; d. v. s.=det vill säga; osv.=och så vidare"),
    ),
    "da": Language(
        ",", ".", "komma", "minus", "til",
        dotted_ordinals=(("()", "[a-zæøå]", ""),),
        currencies={
            "kr": ("en krone|kroner", "en øre|øre"), "€": ("en euro|euro", "en cent|cent"),
            "$": ("en dollar|dollar", "en cent|cent"), "£": ("et pund|pund", "en penny|pence"),
        },
        symbols=_signs("procent; og; plus; er lig med; snabel-a; nummer; nummer; grader; grader Celsius"),
        abbreviations=_pairs("f. eks.=for eksempel; bl. a.=blandt andet; dvs.=det vil sige; osv.=og så videre"),
    ),
    "no": Language(
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
POINT_LANGUAGES = ("am", "bn", "cy", "he", "hi", "ja", "kn", "ko", "te", "th", "zh")
# num2words goes by the country for Kazakh; it has one Norwegian.
CODES = {"nb": "no", "nn": "no", "kk": "kz"}
CURRENCY_CODES = {
    "EUR": "€", "USD": "$", "US$": "$", "GBP": "£", "INR": "₹", "JPY": "¥", "BRL": "R$", "PLN": "zł",
    "SEK": "kr", "NOK": "kr", "DKK": "kr", "kr.": "kr",
}  # fmt: skip
