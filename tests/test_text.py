"""Normalisers: which differences in writing still count when a transcript is scored."""

import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import pytest

from hfspeech.errors import UserError
from hfspeech.text import NORMALIZERS, normalizer


def test_none_changes_white_space_only():
    assert normalizer("none")("  Hello,\t World!\n") == "Hello, World!"


def test_basic_drops_case_punctuation_and_brackets():
    assert normalizer("basic")("Hello, [noise] World! (laughs)") == "hello world"


@pytest.mark.parametrize(
    "word",
    ["किताब", "বাংলা", "தமிழ்", "ที่นี่", "មនុស្ស", "كِتَاب", "ẹ́kọ́"],
    ids=["Hindi", "Bengali", "Tamil", "Thai", "Khmer", "Arabic with vowels", "Yoruba"],
)
def test_marks_keeps_words_whole_that_basic_breaks(word):
    assert normalizer("marks")(f"{word}, {word}!") == f"{word} {word}"
    assert not any(unicodedata.category(c) in ("Mn", "Mc") for c in normalizer("basic")(word))
    assert normalizer("basic")(word) != word


def test_marks_tells_words_apart_that_differ_in_a_mark():
    assert normalizer("marks")("คา") != normalizer("marks")("ค่า")
    assert normalizer("marks")("कि") != normalizer("marks")("की")


def test_marks_equals_basic_where_no_mark_is_left_after_composition():
    text = "Größe, café: “naïve”—1 000 km² [Musik] (lacht) ﬁn … ｆｕｌｌ _x_"
    assert normalizer("marks")(text) == normalizer("basic")(text)


@pytest.mark.parametrize("text", ["❤️ heart", "heart ❤️", "\u0301 heart", "heart ´", "\ufeffheart", "👩‍❤️‍👨 heart"])
def test_marks_leaves_no_mark_standing_alone_as_a_word(text):
    assert normalizer("marks")(text) == "heart"


def test_english_unites_contractions_numbers_and_accents():
    clean = normalizer("english")
    assert clean("I won't pay twenty-five dollars, Mr. Café!") == "i will not pay $25 mister cafe"


def test_english_joins_single_digits_and_basic_does_not():
    assert normalizer("english")("four two nine") == "429"
    assert normalizer("basic")("four two nine") == "four two nine"


def test_english_spelling_comes_from_the_tokenizer():
    tokenizer = SimpleNamespace(english_spelling_normalizer={"colour": "color"})
    assert normalizer("english", tokenizer=tokenizer)("The Colour.") == "the color"
    for without in (None, SimpleNamespace(english_spelling_normalizer=None), SimpleNamespace()):
        assert normalizer("english", tokenizer=without)("The Colour.") == "the colour"


@pytest.mark.parametrize("language", ["en", "EN", "English", "en-GB", "en_us"])
def test_auto_is_english_for_english(language):
    assert normalizer("auto", language).__name__ == "english"


@pytest.mark.parametrize("language", [None, "", "hi", "german", "enm"])
def test_auto_keeps_marks_for_everything_else(language):
    assert normalizer("auto", language).__name__ == "marks"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_two_encodings_of_one_text_are_equal(name):
    text = "Größe café ünï Ångström"
    clean = normalizer(name)
    assert clean(unicodedata.normalize("NFD", text)) == clean(unicodedata.normalize("NFC", text))
    assert unicodedata.is_normalized("NFC", clean(unicodedata.normalize("NFD", text)))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_empty_and_symbols_only(name):
    assert normalizer(name)("") == ""
    assert normalizer(name)("  ") == ""
    assert name == "none" or normalizer(name)("— ¿!? „“") == ""


def test_unknown_name_is_explained():
    with pytest.raises(UserError, match="'englsh'. Did you mean english"):
        normalizer("englsh")


def test_text_does_not_load_torch():
    code = "import sys, hfspeech.text; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
