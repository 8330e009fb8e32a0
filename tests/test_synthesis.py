"""Tests of speech of any length: where texts are cut, how pieces are joined, and the command."""

import csv
import logging

import numpy as np
import pytest
import torch
import torchaudio
from conftest import NANO, ROOT
from transformers import SpeechT5Config, SpeechT5ForTextToSpeech, SpeechT5Processor

from hfspeech import audio
from hfspeech.arguments import DataArguments
from hfspeech.cli import main
from hfspeech.data import load_split
from hfspeech.errors import UserError
from hfspeech.models.speecht5 import save_synthesis
from hfspeech.models.vocoders import load_vocoder
from hfspeech.spelling import TextFrontEnd
from hfspeech.synthesis import at_loudness, max_piece_tokens, split_sentences, split_text, synthesize

NANO_SPEECHT5 = ROOT / "assets/nano_speecht5"
STOPS_AT_ONCE, STOPS_SOMEWHERE, NEVER_STOPS = 20.0, -15.0, -50.0  # bias of the stop probability
SPEAKERS = {"ann": torch.eye(512)[0], "bob": torch.eye(512)[1]}
SETTINGS = {"language": "en", "spell_out": True, "vocoder": "griffin_lim", "speaker_encoder": "mel_statistics"}


def tiny_speecht5(stop_bias):
    torch.manual_seed(0)
    config = SpeechT5Config(
        hidden_size=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, speech_decoder_prenet_units=16, speech_decoder_postnet_units=16,
        vocab_size=37, max_speech_positions=400, max_text_positions=200,
    )  # fmt: skip
    model = SpeechT5ForTextToSpeech(config).eval()
    with torch.no_grad():  # the dropout of the prenet is to be heard, so that rows stop at different steps
        model.speecht5.decoder.prenet.final_layer.weight.mul_(30)
        model.speech_decoder_postnet.feat_out.weight.mul_(5)
    stop = model.speech_decoder_postnet.prob_out
    torch.nn.init.normal_(stop.weight, std=1.8)
    torch.nn.init.constant_(stop.bias, stop_bias)
    return model


@pytest.fixture(scope="module")
def processor():
    return SpeechT5Processor.from_pretrained(NANO_SPEECHT5)


@pytest.fixture(scope="module")
def front_end(processor):
    return TextFrontEnd(processor.tokenizer)


@pytest.fixture(scope="module")
def speak(processor, front_end):
    """Speaks texts with a tiny model, and returns a list of `Spoken`."""
    vocoder = load_vocoder("griffin_lim")

    def speak(texts, stop_bias=STOPS_SOMEWHERE, voices=SPEAKERS["ann"], encoded=None, **options):
        model = tiny_speecht5(stop_bias)
        if encoded is not None:
            model.speecht5.encoder.register_forward_hook(lambda *_: encoded.append(1))
        return list(synthesize(model, processor, front_end, vocoder, texts, voices, **options))

    return speak


@pytest.fixture(scope="module")
def folders(tmp_path_factory, processor):
    """Saved models: one with two voices, one with one, one without."""
    found = {}
    for name, speakers in (("two", SPEAKERS), ("one", {"ann": SPEAKERS["ann"]}), ("none", {})):
        found[name] = tmp_path_factory.mktemp(name)
        tiny_speecht5(STOPS_AT_ONCE).save_pretrained(found[name])
        processor.save_pretrained(found[name])
        save_synthesis(found[name], SETTINGS, speakers)
    return found


@pytest.fixture(autouse=True)
def logger_as_it_was():
    logger = logging.getLogger("hfspeech")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


# Text


@pytest.mark.parametrize(
    "language, sentences",
    [
        ("en", ["Dr. Smith paid $3.50.", "He left at 5 p.m. and slept."]),
        ("en", ["Prof. St. John (Mr. X) met the U.S. Army.", "J. Doe too!", "Why?"]),
        ("en", ['"Stop!" he said.', '"No."', "Then 5 men came..."]),
        ("en", ["See No. 5, e.g. there, vs. us, etc.", "The end…", "So am I.", "Go"]),
        ("en", ["all is small. ".strip(), "so the next one is, too."]),
        ("de", ["Am 3. Mai kam z. B. Herr Dr. Maier.", "Der 2. Mann ging usw.", "Es war 1984.", "Dann nichts."]),
        ("fr", ["M. Dupont a 3,5 litres, p. ex. d’eau.", "Et alors ?", "Rien !"]),
        ("hi", ["यह एक है।", "यह दो है।"]),
    ],
)
def test_sentences_end_where_a_reader_pauses(language, sentences):
    assert split_sentences(" ".join(sentences), language) == sentences


def test_sentences_without_spaces_between_them():
    assert split_sentences("你好。我们走吧！好", "zh") == ["你好。", "我们走吧！", "好"]


def test_paragraphs_and_lines(front_end):
    pieces = split_text("One. Two\nlines.\r\n \r\n* * *\n\nThree.", front_end)
    assert [(piece.text, piece.ends, piece.sentence) for piece in pieces] == [
        ("One.", "sentence", 0), ("Two lines.", "paragraph", 1), ("Three.", "paragraph", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sentence, ends",
    [
        ("a bc de, fg hi", ["clause", "paragraph"]),
        ("a bc de fg hij", ["word", "paragraph"]),
        ("abcdefghijklmn", ["word", "paragraph"]),
        ("1234567 cows", None),
    ],
)
def test_a_long_sentence_is_cut_at_commas_then_spaces(front_end, sentence, ends):
    pieces = split_text(sentence, front_end, max_tokens=14)
    assert all(len(piece.ids) <= 14 and piece.sentence == 0 for piece in pieces)
    assert "".join(piece.text for piece in pieces) == sentence
    assert ends is None or [piece.ends for piece in pieces] == ends


def test_a_piece_fits_the_model_even_when_it_is_spoken_slowly():
    assert max_piece_tokens(SpeechT5Config()) == 150
    assert max_piece_tokens(SpeechT5Config(max_text_positions=60)) == 60
    assert max_piece_tokens(SpeechT5Config(max_speech_positions=400)) * 0.11 <= 400 * 2 * 0.016


@pytest.mark.parametrize("text, named", [("", "empty"), (" \n ", "empty"), ("* -- !", "no letter"), ("łó 世", "'ł'")])
def test_a_text_in_which_nothing_can_be_spoken_is_refused(front_end, text, named):
    with pytest.raises(UserError, match=named):
        split_text(text, front_end)


# Sound


def test_the_result_does_not_depend_on_what_shares_a_batch(speak):
    texts, voices = ["ab. cde, f!", "a", "ab c"], [SPEAKERS["ann"], SPEAKERS["bob"], SPEAKERS["ann"]]
    alone, together = (speak(texts, voices=voices, batch_size=size) for size in (1, 8))
    for one, other in zip(alone, together):
        assert one.sentences == other.sentences and one.is_unfinished == other.is_unfinished
        assert np.abs(one.waveform - other.waveform).max() < 0.01 * np.abs(one.waveform).max()
    lengths = {len(speak(texts[2:], seed=seed)[0].waveform) for seed in range(4)}
    assert len(lengths) > 1, "another seed says it another way"


def test_pieces_are_joined_without_a_click_and_with_pauses(speak):
    (spoken,) = speak(["ab. cd.\n\nef."], stop_bias=NEVER_STOPS, pause_s=0.1)
    first, second, third = spoken.sentences
    assert [sentence["text"] for sentence in spoken.sentences] == ["ab.", "cd.", "ef."]
    assert second["start_s"] - first["end_s"] == pytest.approx(0.1, abs=0.002)
    assert third["start_s"] - second["end_s"] == pytest.approx(0.3, abs=0.002)
    assert third["end_s"] == pytest.approx(len(spoken.waveform) / 16000, abs=0.001)
    jumps = np.abs(np.diff(spoken.waveform, prepend=0, append=0))
    joints = [round(sentence[side] * 16000) for sentence in spoken.sentences for side in ("start_s", "end_s")]
    inside = np.delete(
        jumps, [place for joint in joints for place in range(joint - 20, joint + 20) if 0 <= place < len(jumps)]
    )
    for joint in joints:
        assert jumps[max(joint - 20, 0) : joint + 20].max() <= inside.max() / 2
    pause = spoken.waveform[round(first["end_s"] * 16000) + 16 : round(second["start_s"] * 16000) - 16]
    assert not pause.any()


def test_speech_comes_at_the_loudness_asked_for(speak):
    for text in ("abc. de", "a"):
        (spoken,) = speak([text], stop_bias=NEVER_STOPS if "." in text else STOPS_AT_ONCE)
        quiet = torch.from_numpy(spoken.waveform)[None].repeat(1, 1 if "." in text else 100)
        assert torchaudio.functional.loudness(quiet, 16000).item() == pytest.approx(-23, abs=1)


def test_peaks_lower_the_gain_and_are_not_clipped():
    waveform = 0.001 * np.sin(np.arange(16000) / 5).astype(np.float32)
    waveform[::4000] = 0.5
    louder = at_loudness(waveform, -10)
    assert np.abs(louder).max() == pytest.approx(10 ** (-1 / 20), rel=1e-4)
    assert np.allclose(louder / louder[0], waveform / waveform[0], atol=1e-6)
    assert not at_loudness(np.zeros(100, np.float32), -23).any()


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_the_duration_and_not_the_pitch(speak, processor, front_end, speed):
    usual, changed = (speak(["abc. de"], stop_bias=NEVER_STOPS, speed=s)[0].waveform for s in (1.0, speed))
    assert len(changed) * speed == pytest.approx(len(usual), rel=0.1)
    centroids = [
        torchaudio.functional.spectral_centroid(
            torch.from_numpy(w), 16000, 0, torch.hann_window(1024), 1024, 256, 1024
        )
        for w in (usual, changed)
    ]
    medians = [one[~one.isnan()].median().item() for one in centroids]
    assert medians[1] == pytest.approx(medians[0], rel=0.1)


def test_a_piece_that_does_not_end_is_said_again_and_told(speak, caplog):
    logging.getLogger("hfspeech").propagate = True
    for stop_bias, num_batches in ((STOPS_AT_ONCE, 1), (NEVER_STOPS, 2)):
        seen, encoded = [], []
        with caplog.at_level("WARNING", logger="hfspeech"):
            spoken = speak(["ab  c", "łd"], stop_bias, encoded=encoded, on_progress=seen.append)
        assert len(encoded) == num_batches
        assert [one.is_unfinished for one in spoken] == [stop_bias == NEVER_STOPS] * 2
        assert [one.unknown for one in spoken] == [[], ["ł"]]
        assert sum(seen) == len("ab  c") + len("łd")
    assert len(caplog.records) == 1 and "2 pieces" in caplog.text


def test_texts_are_drawn_as_they_are_needed_and_come_in_order(processor, front_end):
    drawn = []

    def texts():
        for number in range(20):
            drawn.append(number)
            yield "ab. " * (1 + number % 3)

    model, vocoder = tiny_speecht5(STOPS_AT_ONCE), load_vocoder("griffin_lim")
    found = synthesize(model, processor, front_end, vocoder, texts(), SPEAKERS["ann"], batch_size=1)
    first = next(found)
    assert len(drawn) < 10
    assert [len(spoken.sentences) for spoken in (first, *found)] == [1 + number % 3 for number in range(20)]


# Command


def run(*argv):
    """Runs a command line and returns its exit code."""
    try:
        return main([str(word) for word in ("synthesize", *argv)])
    except SystemExit as end:
        return end.code


def test_a_text_becomes_a_recording_in_the_voice_of_another(folders, tmp_path, capsys):
    reference = tmp_path / "ref.wav"
    audio.write(reference, np.random.default_rng(0).normal(0, 0.1, 16000 * 3).astype(np.float32))
    np.save(tmp_path / "voice.npy", SPEAKERS["bob"].numpy())
    (tmp_path / "text.txt").write_text("\ufeffA b.\n\nŁ c.", encoding="utf-8")
    what = ["--file", tmp_path / "text.txt"]
    for model, voice, suffix in (
        ("one", [], "wav"),
        ("two", ["--speaker", "bob"], "flac"),
        ("none", ["--voice", reference], "ogg"),
        ("none", ["--speaker_embedding", tmp_path / "voice.npy", "--speed", "0.5", "--language", "en-GB"], "mp3"),
    ):
        output = tmp_path / "out" / f"speech.{suffix}"
        assert run(folders[model], *what, *voice, "--output", output) == 0
        captured = capsys.readouterr()
        assert str(output) in captured.out and "real-time factor" in captured.out
        assert "'Ł' once" in captured.err
        assert len(audio.decode(output)) > 16000 * 0.75, "the pause after a paragraph"


def mistakes(folders, folder):
    """Command line → what its one sentence has to name."""
    np.save(folder / "short.npy", np.ones(511))
    np.save(folder / "zero.npy", np.zeros(512))
    (folder / "text.npy").write_text("no numbers")
    audio.write(folder / "short.wav", np.full(8000, 0.1, np.float32))
    (folder / "broken.wav").write_bytes(b"RIFF")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "no_text.csv").write_text("file_name,txt\na,b\n")
    (folder / "no_rows.csv").write_text("text\n")
    (folder / "bad_rows.csv").write_text('text\n""\n')
    (folder / "good.csv").write_text("text\na\n")
    (folder / "in_the_way").write_text("")
    (folder / "folder.wav").mkdir()
    two, say, wav = folders["two"], ["--text", "a"], ["--output", folder / "out.wav"]
    ann = ["--speaker", "ann"]
    return {
        "a Whisper": ([NANO, *say, *wav], "whisper"),
        "no such model": ([folder / "none", *say, *wav], "none"),
        "nothing to say": ([two, *wav], "--text"),
        "said twice": ([two, *say, "--file", "b.txt", *wav], "--file"),
        "no output": ([two, *say], "--output"),
        "empty": ([two, "--text", " ", *ann, *wav], "--text is empty"),
        "unspeakable": ([two, "--text", "世", *ann, *wav], "世"),
        "no such file": ([two, "--file", folder / "no.txt", *wav], "no.txt"),
        "unknown kind of file": ([two, "--file", folder / "a.docx", *wav], ".txt"),
        "empty file": ([two, "--file", folder / "empty.txt", *wav], "empty.txt"),
        "not UTF-8": ([two, "--file", folder / "latin.txt", *wav], "UTF-8"),
        "no column": ([two, "--file", folder / "no_text.csv", "--output", folder / "o"], "Did you mean txt?"),
        "no rows": ([two, "--file", folder / "no_rows.csv", "--output", folder / "o"], "no_rows.csv"),
        "table into a file": ([two, "--file", folder / "good.csv", *wav], "folder"),
        "table onto itself": ([two, "--file", folder / "good.csv", "--output", folder], "overwritten"),
        "unknown suffix": ([two, *say, *ann, "--output", folder / "out.doc"], ".flac"),
        "folder in the way": ([two, *say, *ann, "--output", folder / "folder.wav"], "folder.wav"),
        "unwritable": ([two, *say, *ann, "--output", folder / "in_the_way" / "a.wav"], "--output"),
        "speed": ([two, *say, *ann, *wav, "--speed", "3"], "0.5 to 2"),
        "no speed": ([two, *say, *ann, *wav, "--speed", "fast"], "--speed"),
        "not a number": ([two, *say, *ann, *wav, "--speed", "nan"], "0.5 to 2"),
        "seed": ([two, *say, *ann, *wav, "--seed", "-1"], "--seed"),
        "language": ([two, *say, *ann, *wav, "--language", "germn"], "german"),
        "vocoder": ([two, *say, *ann, *wav, "--vocoder", "grifin_lim"], "griffin_lim"),
        "two voices": ([two, *say, *wav], "ann, bob"),
        "unknown voice": ([two, *say, *wav, "--speaker", "anne"], "Did you mean ann?"),
        "voice given twice": ([two, *say, *ann, *wav, "--voice", "a.wav"], "--voice"),
        "no voice": ([folders["none"], *say, *wav], "--voice"),
        "no voices of its own": ([folders["none"], *say, *ann, *wav], "--voice"),
        "no such recording": ([two, *say, *wav, "--voice", folder / "no.wav"], "no.wav"),
        "short recording": ([two, *say, *wav, "--voice", folder / "short.wav"], "0.5 s"),
        "broken recording": ([two, *say, *wav, "--voice", folder / "broken.wav"], "broken.wav"),
        "unknown encoder": ([two, *say, *wav, "--voice", folder / "short.wav", "--speaker_encoder", "x"], "x"),
        "no such embedding": ([two, *say, *wav, "--speaker_embedding", folder / "no.npy"], "no.npy"),
        "short embedding": ([two, *say, *wav, "--speaker_embedding", folder / "short.npy"], "511"),
        "zero embedding": ([two, *say, *wav, "--speaker_embedding", folder / "zero.npy"], "zero"),
        "not an embedding": ([two, *say, *wav, "--speaker_embedding", folder / "text.npy"], "numpy.save"),
    }


def test_every_mistake_gets_one_sentence_and_exit_code_2(folders, tmp_path, capsys):
    for name, (argv, expected) in mistakes(folders, tmp_path).items():
        code, captured = run(*argv), capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == 2, name
        assert len(lines) == 1 and expected in lines[0] and lines[0].endswith((".", "?")), (name, captured.err)
    assert not (tmp_path / "out.wav").exists()


def test_a_table_becomes_an_audiofolder(folders, tmp_path, capsys):
    audio.write(tmp_path / "ref.wav", np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32))
    (tmp_path / "rows.csv").write_text(
        "file_name,id,text,speaker,voice\n"
        'clips/a.mp3,,"A, b. C.",ann,\n'
        ",b.1,d,bob,\n"
        ",,e,,ref.wav\n"
        "../escape.wav,,f,ann,\n"
        "/escape.wav,,f,ann,\n"
        ",b.1,g,ann,\n"
        ",,,ann,\n"
        "h.wav,,世,ann,\n"
        "i.wav,,i,eve,\n"
        "j.wav,,j,,no.wav\n"
    )
    output = tmp_path / "out"
    assert run(folders["two"], "--file", tmp_path / "rows.csv", "--output", output) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "row" in line]
    for number, named in zip(range(4, 11), ["leads out", "leads out", "row 2", "empty", "世", "eve", "no.wav"]):
        assert f"row {number}" in told[number - 4] and named in told[number - 4]
    assert told[-1] == "7 of 10 rows could not be spoken." and len(told) == 8
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert written == [
        "out/00003.wav", "out/b.1.wav", "out/clips/a.wav", "out/metadata.csv", "ref.wav", "rows.csv",
    ]  # fmt: skip

    with (output / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["speaker"] for row in rows] == ["ann", "bob", "ref.wav"]
    split = load_split(DataArguments(dataset_name=[str(output)], min_duration_in_seconds=0.01), "train")
    assert split.column("text") == ["A, b. C.", "d", "e"]
    assert split.column("duration_s") == pytest.approx([float(row["seconds"]) for row in rows], abs=0.001)


def test_a_voice_on_the_command_line_wins_over_the_table(folders, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "speaker": "eve"}\n{"text": "b"}\n')
    assert (
        run(folders["two"], "--file", tmp_path / "rows.jsonl", "--speaker", "bob", "--output", tmp_path / "out") == 0
    )
    with (tmp_path / "out" / "metadata.csv").open(newline="") as file:
        assert [row["speaker"] for row in csv.DictReader(file)] == ["bob", "bob"]
