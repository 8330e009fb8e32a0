"""Text on its way into speech synthesis: what is spoken, what the tokenizer can take, and characters added to it."""

import collections
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AddedToken,
    SpeechT5Config,
    SpeechT5FeatureExtractor,
    SpeechT5ForTextToSpeech,
    SpeechT5Processor,
    SpeechT5Tokenizer,
)

from hfspeech.errors import UserError
from hfspeech.spelling import TextFrontEnd, add_characters, spell_out, unknown_characters, unknown_report

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box, with five dozen jugs.",
    "it's a café at noon",
]

SPOKEN = {
    "en": {
        "Dr. Smith lives on Elm St. in St. Louis.": "Doctor Smith lives on Elm Street in Saint Louis.",
        "1,234,567.05 items": (
            "one million two hundred and thirty-four thousand five hundred and sixty-seven point zero five items"
        ),
        "-5 or 3.14": "minus five or three point one four",
        "the 3rd and 21st": "the third and twenty-first",
        "In 1984, not 2,084": "In nineteen eighty-four, not two thousand and eighty-four",
        "the 1980s": "the nineteen eighties",
        "14:30, 9:05, 2:00 pm": "fourteen thirty, nine oh five, two pm",
        "call 555-123-4567 or 007": "call five five five, one two three, four five six seven or zero zero seven",
        "+49 30 1234567": "plus four nine, three zero, one two three four five six seven",
        "500-1000 people": "five hundred-one thousand people",
        "01/02/2020": "zero one/zero two/twenty twenty",
        "12345678": "one two three four five six seven eight",
        "$5.20, $1, £0.50": "five dollars and twenty cents, one dollar, fifty pence",
        "-$3 or $5 million": "minus three dollars or five million dollars",
        "20°C, 5% & R&D = C++": "twenty degrees Celsius, five percent and R and D equals C plus plus",
        "#5 at a@b": "number five at a at b",
        "“No. 5” — it’s 10–20…": "\"Number five\" - it's ten to twenty...",
        "MP3, 3:2": "MP three, three: two",
        "so, etc.": "so, et cetera.",
        "No. Never.": "No. Never.",
    },
    "de": {
        "Um 14:30 Uhr kosten 1.000 Stück z. B. 2,5 €.": (
            "Um vierzehn Uhr dreißig kosten eintausend Stück zum Beispiel zwei Komma fünf Euro."
        ),
        "Am 3. Mai, der 3. Mann; es waren 3. Dann": "Am dritten Mai, der dritte Mann; es waren drei. Dann",
        "1,01 €, 5 Mio. €": "ein Euro und ein Cent, fünf Millionen Euro",
        "−5 °C d.h. kalt": "minus fünf Grad Celsius das heißt kalt",
        "1984": "neunzehnhundertvierundachtzig",
    },
    "fr": {
        "M. Dupont, 14h30, 1er et 2e, à 1h": (
            "Monsieur Dupont, quatorze heures trente, premier et deuxième, à une heure"
        ),
        "12\u202f345,67 €": "douze mille trois cent quarante-cinq euros et soixante-sept centimes",
        "l’eau p. ex. 3,5 %": "l'eau par exemple trois virgule cinq pour cent",
    },
    "es": {
        "1.ª Sra. López: 1.234,5": "primera señora López: mil doscientos treinta y cuatro coma cinco",
        "21 €": "veintiún euros",
    },
    "it": {
        "3,05 ecc. e 2º": "tre virgola zero cinque eccetera e secondo",
        "Sig. Rossi, 5 €": "signor Rossi, cinque euro",
    },
    "nl": {
        "€ 5,20 bijv. om 14:30 uur": "vijf euro en twintig cent bijvoorbeeld om veertien uur dertig",
        "3e": "derde",
    },
    "pl": {
        "np. 2 zł, 5 zł, 12 zł, 1 zł": "na przykład dwa złote, pięć złotych, dwanaście złotych, jeden złoty",
        "-5 i 12 345": "minus pięć i dwanaście tysięcy trzysta czterdzieści pięć",
    },
    "pt": {
        "R$ 5,20 às 14h30": "cinco reais e vinte centavos às catorze e trinta",
        "p. ex. 3.º": "por exemplo terceiro",
    },
    "pt-BR": {"16": "dezesseis"},
    "german": {"3 Hunde": "drei Hunde"},
    "sv": {"20 kr": "tjugo kronor"},
    "nb": {"3. mai": "tredje mai"},
    "fi": {"3,5": "kolme pilkku viisi"},
    "bn": {"৫": "পাঁচ"},
    "hi": {"5 और 3.5": "5 और 3.5"},
    "xx": {"1–2 “a”": '1-2 "a"'},
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [(language, text, spoken) for language, table in SPOKEN.items() for text, spoken in table.items()],
)
def test_text_is_written_as_it_is_spoken_and_then_left_alone(language, text, spoken):
    assert spell_out(text, language) == spoken
    assert spell_out(spoken, language) == spoken


def test_plain_text_only_loses_its_typography():
    text = "  She said, so it's fine -  isn't it?\n(Yes; I think so!) "
    assert spell_out(text) == " ".join(text.split())
    assert spell_out("cafe\u0301 «oui»\xa0! wo\u00adrd") == 'café "oui" ! word'


@pytest.mark.parametrize("language", ["en", "de", "pl", "cs", "it", "he", "hi"])
def test_no_number_is_too_odd(language):
    huge = ",".join(["999"] * 200)
    odd = ["9" * 5000, f"${'9' * 5000}", f"-{'1' * 5000}", f"{'9' * 400}th", "1.2.3.4", "٣", "²", "0x1F", "-0", "3."]
    for text in [*odd, f"${huge}.50", huge, huge.replace(",", "."), huge.replace(",", " ")]:
        assert spell_out(text, language)


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "spm_char"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(prefix), model_type="char", vocab_size=60,
        hard_vocab_limit=False, character_coverage=1.0, bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return f"{prefix}.model"


@pytest.fixture(params=["pieces only", "two tokens after the pieces", "saved and loaded"])
def tokenizer(request, vocabulary_file, tmp_path):
    tokenizer = SpeechT5Tokenizer(vocabulary_file)
    if request.param != "pieces only":
        tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
        tokenizer.add_tokens(["<ctc_blank>"])
    if request.param == "saved and loaded":
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        tokenizer = SpeechT5Tokenizer.from_pretrained(tmp_path / "tokenizer")
    return tokenizer


@pytest.fixture
def processor(tokenizer):
    return SpeechT5Processor(SpeechT5FeatureExtractor(), tokenizer)


def tiny_model(vocab_size):
    torch.manual_seed(0)
    config = SpeechT5Config(
        vocab_size=vocab_size, hidden_size=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16, speech_decoder_prenet_dropout=0.0, positional_dropout=0.0,
    )  # fmt: skip
    return SpeechT5ForTextToSpeech(config).eval()


def spectrogram(model, ids):
    # The prenet's dropout is on even in eval mode, so the seed must be the same.
    torch.manual_seed(1)
    frames = torch.linspace(-1, 1, 8 * 80).view(1, 8, 80)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            labels=frames, speaker_embeddings=torch.ones(1, 512),
        ).spectrogram  # fmt: skip


def test_front_end_gives_the_tokenizer_what_it_can_take(tokenizer):
    front_end = TextFrontEnd(tokenizer)
    assert front_end("The  Café:\n2 JUGS") == "the café: two jugs"
    assert front_end.unknown("The  Café:\n2 JUGS") == [":"]
    assert front_end.ids("Fox") == tokenizer("fox").input_ids
    assert tokenizer.convert_ids_to_tokens(front_end.ids("Fox")) == ["▁", "f", "o", "x", "</s>"]
    assert TextFrontEnd(tokenizer, spell_out=False)("2 Jugs") == "2 jugs"
    assert TextFrontEnd(tokenizer, "de")("2") == "zwei"


def test_capitals_stay_where_the_tokenizer_has_them_or_lacks_both(processor):
    add_characters(tiny_model(len(processor.tokenizer)), processor, "TÉ")
    assert TextFrontEnd(processor.tokenizer)("THE ÉŁ İ") == "The ÉŁ İ"


def test_unknown_characters_are_counted_one_by_one(tokenizer):
    front_end = TextFrontEnd(tokenizer, spell_out=False)
    assert front_end.unknown("łódź, 77 łłe\u0301") == ["ł", "ó", "ź", "7", "7", "ł", "ł"]
    counter = unknown_characters(front_end, ["łódź", "the fox", "łł 7"])
    assert counter == {"ł": 3, "ó": 1, "ź": 1, "7": 1}
    assert unknown_report(counter) == "'ł' 3 times, 'ó' once, 'ź' once, '7' once"
    assert unknown_report(counter, limit=1) == "'ł' 3 times and 3 more"
    assert unknown_report(collections.Counter()) == "none"
    assert unknown_characters(front_end, SENTENCES) == {}


def test_added_characters_leave_old_text_as_it_was(processor, tmp_path):
    old = processor.tokenizer
    old_ids = [old(text).input_ids for text in SENTENCES]
    old_vocabulary, old_size = old.get_vocab(), len(old)
    model = tiny_model(old_size)
    old_rows = model.get_input_embeddings().weight.detach().clone()
    old_spectrograms = [spectrogram(model, ids) for ids in old_ids]

    add_characters(model, processor, ["ł", "ó", "e", "ó", "7", "ж"])
    assert processor.tokenizer is not old and len(old) == old_size
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    loaded = SpeechT5ForTextToSpeech.from_pretrained(tmp_path / "out").eval()
    tokenizer = SpeechT5Processor.from_pretrained(tmp_path / "out").tokenizer

    for m, t in [(model, processor.tokenizer), (loaded, tokenizer)]:
        assert len(t) == m.config.vocab_size == m.get_input_embeddings().num_embeddings == old_size + 4
        assert m.get_input_embeddings().padding_idx == t.pad_token_id
        assert {token: t.get_vocab()[token] for token in old_vocabulary} == old_vocabulary
        assert {**old.special_tokens_map} == {**t.special_tokens_map}
        assert torch.equal(m.get_input_embeddings().weight[:old_size], old_rows)
        assert [t(text).input_ids for text in SENTENCES] == old_ids
        for ids, before in zip(old_ids, old_spectrograms):
            assert torch.equal(spectrogram(m, ids), before)

    ids = tokenizer("pół 7").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "p", "ó", "ł", "▁", "7", "</s>"]
    assert max(ids) < loaded.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == "pół 7"
    assert TextFrontEnd(tokenizer)("PÓŁ") == "pół"
    # Nothing of the folder in which the tokenizer was put together is left.
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    old.save_pretrained(tmp_path / "old")
    before = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    assert config.keys() - {"processor_class"} == before.keys()
    assert processor.tokenizer.name_or_path == old.name_or_path


def test_a_new_row_starts_as_what_looks_like_it(processor):
    model = tiny_model(len(processor.tokenizer))
    old = processor.tokenizer.get_vocab()
    add_characters(model, processor, ["ó", "ł", "É", "T", "ж", "7"])
    weight = model.get_input_embeddings().weight
    row = {c: weight[processor.tokenizer.convert_tokens_to_ids(c)] for c in "ółÉTж7"}
    for character, like in [("ó", "o"), ("ł", "l"), ("É", "é"), ("T", "t"), ("7", "▁")]:
        assert torch.equal(row[character], weight[old[like]]), character
    letters = [index for token, index in old.items() if token in "abcdefghijklmnopqrstuvwxyzé"]
    torch.testing.assert_close(row["ж"], weight[letters].mean(0))


def test_characters_can_be_added_twice_and_rows_to_spare_are_used(processor):
    size = len(processor.tokenizer)
    model = tiny_model(size + 2)
    add_characters(model, processor, "ó")
    add_characters(model, processor, "ł")
    assert model.config.vocab_size == size + 2
    add_characters(model, processor, "óźł")
    assert model.config.vocab_size == len(processor.tokenizer) == size + 3
    assert processor.tokenizer.convert_tokens_to_ids(["ó", "ł", "ź"]) == [size, size + 1, size + 2]
    before = processor.tokenizer
    add_characters(model, processor, "abc")
    assert processor.tokenizer is before


def test_a_character_that_the_tokenizer_writes_as_others_adds_those(processor):
    add_characters(tiny_model(len(processor.tokenizer)), processor, "½")
    assert TextFrontEnd(processor.tokenizer, spell_out=False).unknown("½ 1⁄2") == []


@pytest.mark.parametrize("entry", [" ", "\n", "ab", "", "x\u0323\u0307"])
def test_only_single_characters_are_added(processor, entry):
    with pytest.raises(UserError, match="single characters"):
        add_characters(tiny_model(len(processor.tokenizer)), processor, ["ł", entry])
    assert TextFrontEnd(processor.tokenizer).unknown("ł") == ["ł"]


def test_the_module_loads_without_torch_and_transformers():
    code = "import sys, hfspeech.spelling; assert not {'torch', 'transformers', 'num2words'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
