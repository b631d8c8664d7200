"""The tokenizer of a checkpoint, over four small ones of the kinds that language models use."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from expertmesh.cluster.errors import CorruptCheckpointError, InputError, UnsupportedModelError
from expertmesh.models.tokenizer import IncrementalDecoder, Tokenizer, open_tokenizer

UNKNOWN = "<unk>"
CORPUS = ["the cat sat on the mat , and the cat said : hello !", "naïve café 你好 你们好 😀😀"] * 4
SPECIAL = ["<|end|>", UNKNOWN]


def byte_level() -> tokenizers.Tokenizer:
    """Of the GPT-2, Qwen and Llama 3 kind: bytes are the alphabet, merges may split characters anywhere."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Of the Llama 2 and Mixtral kind: pieces with a mark for the space, and 256 tokens for the bytes of all else."""
    words = ["▁", "▁the", "▁cat", "s", "at", "▁mat", "é", "你", "<think>"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *"▁abcdefghijklmnopqrstuvwxyz,:!"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """Of the T5 kind."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    """Of the BERT kind."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {make.__name__: make for make in (byte_level, byte_fallback, metaspace, wordpiece)}


def save(tokenizer: tokenizers.Tokenizer, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "unk_token": UNKNOWN}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        yield root / "expertmesh"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    found = {kind: open_tokenizer(save(make(), directory / kind)) for kind, make in KINDS.items()}
    return {kind: tokenizer for kind, tokenizer in found.items() if tokenizer is not None}


def check_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Decode one by one, and hold the pieces against the text of all."""
    ids = list(ids)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    return pieces


def ids_of(tokenizer: Tokenizer, names: Iterable[str]) -> list[int]:
    found = [tokenizer._backend.token_id(name) for name in names]
    ids = [token_id for token_id in found if token_id is not None]
    assert len(ids) == len(found)
    return ids


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte; byte-level names are printable Latin-1 as it is, other bytes in order from U+0100 on."""
    if tokenizer.byte_ids:
        return ids_of(tokenizer, (f"<0x{byte:02X}>" for byte in data))
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return ids_of(tokenizer, (names[byte] for byte in data))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_ids_join_to_their_text(opened: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = opened[kind]
    # 999 is in no vocabulary; embeddings are often padded beyond it.
    any_id = st.one_of(st.integers(0, KINDS[kind]().get_vocab_size() - 1), st.just(0), st.just(999))

    @settings(max_examples=150, deadline=None)
    @given(st.lists(any_id, max_size=40))
    def check(ids: list[int]) -> None:
        check_pieces(tokenizer, ids)

    check()


@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=20).map(lambda text: text.encode()[1:])))
def test_pieces_of_any_bytes_join_to_their_text(opened: dict[str, Tokenizer], data: bytes) -> None:
    tokenizer = opened["byte_level"]
    ids = byte_tokens(tokenizer, data)
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    check_pieces(tokenizer, ids)
    fallback = opened["byte_fallback"]
    check_pieces(fallback, byte_tokens(fallback, data))


def test_a_character_comes_whole(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte_level"]
    ids = byte_tokens(tokenizer, "a😀é你".encode())
    assert check_pieces(tokenizer, ids) == ["a", "", "", "", "😀", "", "é", "", "", "你"]
    fallback = opened["byte_fallback"]
    ids = fallback.encode("a😀 cat")
    assert ids[2:6] == byte_tokens(fallback, "😀".encode())
    assert check_pieces(fallback, ids)[:7] == ["", "a", "", "", "", "", "😀 "]


def test_an_unfinished_character_comes_with_the_flush(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte_level"]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(i) for i in byte_tokens(tokenizer, "é😀".encode()[:-1])] == ["", "é", "", "", ""]
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""


def test_bad_bytes_are_not_held_for_ever(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte_level"]
    pieces = check_pieces(tokenizer, byte_tokens(tokenizer, b"a" + b"\x80" * 20 + "é".encode()))
    assert len("".join(pieces[:16])) >= 1 + 15 - 4


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_comes_at_once(opened: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = opened[kind]
    pieces = check_pieces(tokenizer, tokenizer.encode("the cat sat on the mat"))
    assert "".join(pieces) == "the cat sat on the mat"
    assert all(pieces[1:])


class CountingTokenizer(Tokenizer):
    """Counts the ids that are decoded."""

    num_decoded = 0

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        self.num_decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("byte_level", ["Ġ", "t"]),
        ("byte_level", ["Ģ"]),  # byte 0x80: continues no character
        ("byte_level", ["ð", "Ł"]),  # bytes 0xF0 0x9F: begin a character that is never finished
        ("byte_fallback", ["▁the"]),
        ("byte_fallback", ["<0xF0>"]),
    ],
)
def test_the_work_grows_with_the_tokens_alone(opened: dict[str, Tokenizer], kind: str, names: list[str]) -> None:
    tokenizer = CountingTokenizer(opened[kind]._backend)
    tokenizer.num_decoded = 0
    ids = ids_of(tokenizer, names)
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.push(token_id) for token_id in ids * (3000 // len(ids))) + decoder.flush()
    assert tokenizer.num_decoded < 40 * 3000
    assert text == tokenizer.decode(ids * (3000 // len(ids)))


def test_encode_and_decode(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte_level"]
    ids = tokenizer.encode("hello 😀<|end|><think>")
    assert 0 in ids
    assert tokenizer.decode(ids) == "hello 😀<think>"
    # Spaces before punctuation stay: cleaning up would change pieces that are out already.
    for kind in KINDS:
        assert opened[kind].decode(opened[kind].encode("the cat , hello !")) == "the cat , hello !"
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("half \ud83d")


def test_the_special_tokens_of_the_template_are_added(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    tokenizer = open_tokenizer(save(backend, tmp_path))
    assert tokenizer is not None
    assert tokenizer.encode("cat")[0] == 0
    assert tokenizer.encode("cat", add_special_tokens=False) == tokenizer.encode("cat")[1:]
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_text_is_what_it_adds_to_a_text(opened: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = opened[kind]
    ids = tokenizer.encode("the cat sat on the mat")
    assert "".join(tokenizer.token_text(token_id) for token_id in ids).strip() == tokenizer.decode(ids)


def test_a_token_without_whole_characters_or_text_goes_by_its_name(opened: dict[str, Tokenizer]) -> None:
    assert opened["byte_level"].token_text(0) == "<|end|>"
    assert opened["byte_level"].token_text(byte_tokens(opened["byte_level"], b"\xe4")[0]) == "\u00e4"
    assert opened["byte_fallback"].token_text(byte_tokens(opened["byte_fallback"], b"\xe4")[0]) == "<0xE4>"
    assert opened["byte_level"].token_text(10**6) == ""


def test_names_of_bytes_that_are_plain_text_are_no_bytes(opened: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert len(opened["byte_fallback"].byte_ids) == 256
    assert opened["byte_level"].byte_ids == frozenset()
    backend = byte_fallback()
    backend.decoder = decoders.Fuse()
    tokenizer = open_tokenizer(save(backend, tmp_path))
    assert tokenizer is not None
    assert tokenizer.byte_ids == frozenset()


def test_no_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert open_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [b"", b'{"version": "1.0", "model"', b"[]", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: bytes) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CorruptCheckpointError, match=f"/{name} "):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'])
def test_json_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CorruptCheckpointError, match=r"/tokenizer\.json cannot be loaded"):
        open_tokenizer(tmp_path)


def test_files_without_a_tokenizer_json(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"\['tokenizer_config.json'\], but no tokenizer\.json"):
        open_tokenizer(tmp_path)


def test_the_import_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, expertmesh.models.tokenizer; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_ids_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    directory = save(KINDS[kind](), tmp_path_factory.mktemp("compared"))
    theirs = AutoTokenizer.from_pretrained(directory)
    first, kept = open_tokenizer(directory), open_tokenizer(directory)
    assert first is not None
    assert kept is not None
    some_text = st.text() | st.lists(st.sampled_from(["the", " cat", "<|end|>", "<think>", "你", "😀", "  "])).map(
        "".join
    )

    @settings(max_examples=60)
    @given(text=some_text, ids=st.lists(st.integers(0, len(theirs) + 3)))
    def check(text: str, ids: list[int]) -> None:
        if text.isprintable():  # of what is no character, test_encode_and_decode says more
            assert first.encode(text) == kept.encode(text) == theirs.encode(text)
        wanted = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert first.decode(ids) == kept.decode(ids) == wanted

    check()


def test_one_that_is_kept_is_opened_without_transformers(tmp_path: Path, cache: Path) -> None:
    save(byte_level(), tmp_path)
    open_tokenizer(tmp_path)
    code = (
        "import sys; from pathlib import Path; from expertmesh.models.tokenizer import open_tokenizer;"
        f"print(open_tokenizer(Path({str(tmp_path)!r})).encode('the cat'));"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer is not None
    assert run.stdout.split("\n")[:2] == [str(tokenizer.encode("the cat")), "[]"]


def test_a_checkpoint_that_has_changed_is_opened_anew(tmp_path: Path) -> None:
    before = open_tokenizer(save(byte_level(), tmp_path))
    after = open_tokenizer(save(byte_fallback(), tmp_path))
    assert before is not None
    assert after is not None
    assert not before.byte_ids
    assert len(after.byte_ids) == 256


def test_truncation_in_the_file_is_not_applied(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    save(backend, tmp_path)
    for tokenizer in (open_tokenizer(tmp_path), open_tokenizer(tmp_path)):
        assert tokenizer is not None
        assert len(tokenizer.encode("cat")) < 9
        assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"


def test_a_damaged_kept_one_is_made_anew(tmp_path: Path, cache: Path) -> None:
    save(byte_level(), tmp_path)
    before = set(cache.glob("tokenizer-*"))
    backend = byte_level()
    backend.add_tokens(["another"])
    first = open_tokenizer(save(backend, tmp_path))
    (kept,) = set(cache.glob("tokenizer-*")) - before
    content = kept.read_bytes()
    kept.write_bytes(content[:100])
    again = open_tokenizer(tmp_path)
    assert first is not None
    assert again is not None
    assert first.encode("another cat") == again.encode("another cat")
    assert kept.read_bytes() == content


def test_without_a_place_to_keep_it_it_is_opened_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_tokenizer(save(byte_level(), tmp_path / "checkpoint")) is not None


def test_one_that_does_more_than_the_library_is_left_to_transformers(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(byte_level(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))
    before = set(cache.glob("tokenizer-*"))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer is not None
    assert set(cache.glob("tokenizer-*")) == before
    # "<|end|>" is text to such a tokenizer.
    assert tokenizer.decode(tokenizer.encode("cat<|end|>")) == "cat<|end|>"
