"""Teaching a tokenizer, and the model behind it, characters that they lack."""

import unicodedata

from hfspeech.errors import UserError
from hfspeech.spelling.front_end import knows


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
        if not knows(extended, character):
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
        new |= {c: None for c in tokenizer.sp_model.normalize(character) if c != "▁" and not knows(tokenizer, c)}
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
