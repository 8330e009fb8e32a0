"""Every format, rate and channel count decodes to 16 kHz mono; every kind of broken file is found and named."""

import io

import numpy as np
import pytest
import soundfile

from hfspeech.audio import NOT_AUDIO, BadAudio, decode, duration_s, write
from hfspeech.errors import UserError


def tone(seconds=1.0, sampling_rate=16000, hertz=440):
    times_s = np.arange(round(seconds * sampling_rate)) / sampling_rate
    return (0.3 * np.sin(2 * np.pi * hertz * times_s)).astype("float32")


def encoded(waveform, sampling_rate=16000, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, waveform, sampling_rate, format=format, subtype=subtype)
    return file.getvalue()


def noise(num_samples):
    return (0.1 * np.random.default_rng(0).normal(size=num_samples)).astype("float32")


@pytest.mark.parametrize("format, subtype", [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", None),
                                             ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])  # fmt: skip
@pytest.mark.parametrize("sampling_rate", [8000, 22050, 48000])
def test_any_format_and_rate_becomes_16_khz(format, subtype, sampling_rate):
    if subtype == "OPUS" and sampling_rate == 22050:
        sampling_rate = 24000
    content = encoded(tone(1.0, sampling_rate), sampling_rate, format, subtype)
    waveform = decode(content)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - 16000) <= 16
    assert duration_s(content) == pytest.approx(1.0, abs=0.005)
    spectrum = np.abs(np.fft.rfft(waveform[2000:14000]))
    assert np.argmax(spectrum) * 16000 / 12000 == pytest.approx(440, abs=2)
    assert np.abs(waveform[2000:14000]).max() == pytest.approx(0.3, rel=0.15)


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.5), tone(0.5, hertz=900)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    assert np.allclose(decode(path), (left + right) / 2, atol=1e-6)
    assert np.array_equal(decode(str(path)), decode(path.read_bytes()))


def test_segment_is_the_same_samples():
    waveform = noise(48000)
    content = encoded(waveform, subtype="FLOAT")
    assert np.array_equal(decode(content, offset_s=1.0, num_s=0.5), waveform[16000:24000])
    assert np.array_equal(decode(content, offset_s=2.5), waveform[40000:])
    with pytest.raises(BadAudio, match="ends after"):
        decode(content, offset_s=2.5, num_s=1.0)
    with pytest.raises(BadAudio, match="starts after"):
        decode(content, offset_s=3.5, num_s=1.0)


def test_truncated_wav_says_how_much_is_there():
    content = encoded(noise(80000))[: 44 + 2 * 31200]
    for read in (decode, duration_s):
        with pytest.raises(BadAudio, match="truncated: header says 80000 samples, 31200 decoded"):
            read(content)


@pytest.mark.parametrize("format, subtype", [("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("FLAC", None),
                                             ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])  # fmt: skip
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_found(format, subtype, share):
    content = encoded(noise(80000), 16000, format, subtype)
    assert len(decode(content)) == 80000
    with pytest.raises(BadAudio, match="truncated"):
        decode(content[: int(len(content) * share)])


def riff(*chunks):
    body = b"WAVE" + b"".join(name + len(content).to_bytes(4, "little") + content for name, content in chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("format, subtype", [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
                                             ("WAV", "ULAW"), ("WAVEX", "PCM_16"), ("FLAC", "PCM_24")])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2])
def test_duration_is_the_one_that_libsndfile_reads(format, subtype, channels):
    content = encoded(np.stack([noise(20_001)] * channels, axis=1), 44100, format, subtype)
    header = content.find(b"data") + 8 if format != "FLAC" else 4 + 38
    for audio in (content, content + b"tail", content[:-1], content[: header + 7], content[:header]):
        try:
            info = soundfile.info(io.BytesIO(audio))
            seconds = info.frames / info.samplerate
        except soundfile.LibsndfileError:
            seconds = None
        try:
            assert duration_s(audio) == seconds == 20_001 / 44100
        except BadAudio:
            assert audio != content


def test_chunks_before_the_samples_are_passed_over():
    content = encoded(noise(16000))
    chunks = (b"fmt ", content[20:36]), (b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0"), (b"data", content[44:])
    assert duration_s(riff(*chunks)) == 1.0
    with pytest.raises(BadAudio, match="truncated: header says 16000 samples, 8000 decoded"):
        duration_s(riff(*chunks)[:-16000])
    assert duration_s(riff(chunks[0], (b"LIST", bytes(10_000)), chunks[2])) == 1.0


def test_wav_written_to_a_pipe_is_whole():
    content = bytearray(encoded(tone()))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(content))) == 16000


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "0 bytes"),
        (encoded(np.zeros(0, "float32")), "0 samples"),
        (encoded(np.zeros(16000, "float32")), "all samples are zero"),
        (encoded(np.full(16000, np.nan, "float32"), subtype="FLOAT"), "NaN"),
        (b"this is a letter and no audio" * 100, NOT_AUDIO),
        (encoded(tone())[:20], "truncated"),
    ],
)
def test_bad_audio_says_why(content, reason, tmp_path):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    for audio in (content, path):
        with pytest.raises(BadAudio, match=reason):
            decode(audio)


def test_missing_file_is_bad_audio(tmp_path):
    with pytest.raises(BadAudio, match="no such file"):
        duration_s(tmp_path / "none.wav")


def test_m4a_without_ffmpeg_names_what_to_install():
    try:
        import torchcodec  # noqa: F401

        pytest.skip("torchcodec is installed")
    except (ImportError, RuntimeError):
        pass
    with pytest.raises(UserError, match="pip install torchcodec"):
        decode(b"\0\0\0\x20ftypM4A " + bytes(1000))


@pytest.mark.parametrize("name", ["a.wav", "deep/a.flac", "a.mp3", "a.ogg", "a.opus"])
def test_written_audio_is_read_back(tmp_path, name):
    write(tmp_path / name, tone())
    assert abs(len(decode(tmp_path / name)) - 16000) <= 16


def test_unknown_suffix_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"\.xyz"):
        write(tmp_path / "a.xyz", tone())
