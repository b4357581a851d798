"""What heads say of themselves, packed."""

import json
import zlib
from base64 import b85encode

import pytest

from h2t import packed
from h2t.errors import UserError
from h2t.packed import DICTIONARY, pack, unpack


def test_what_is_packed_comes_back_the_same_and_short() -> None:
    content = {"taps": [f"blocks_{n}_0_bn1" for n in range(50)], "nämë": [1e-5, None, True, {"a": '\\"'}]}
    text = pack(content)
    assert unpack(text) == content
    assert text == pack(dict(reversed(content.items())))
    assert len(text) < len(json.dumps(content)) / 3
    assert json.dumps(text) == f'"{text}"'  # it stands in the file's header as it is


def test_the_dictionary_is_that_of_every_file_written() -> None:
    assert zlib.adler32(DICTIONARY) == 0x4A6D105C


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut short"),
        ("cäö", "ASCII"),
        ('not base85!"', "base85"),
        (b85encode(zlib.compress(b"{}")[:-1]).decode(), "cut short"),
        (b85encode(b"abcdefgh").decode(), "cannot be unpacked"),
        (b85encode(zlib.compress(b"[")).decode(), "Expecting value"),
    ],
)
def test_what_was_not_packed_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(text)


def test_neither_more_than_is_allowed_is_packed_nor_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    text = pack({"zeros": "0" * 10_000})
    monkeypatch.setattr(packed, "LARGEST", 1000)
    with pytest.raises(ValueError, match="holds more than 1,000 bytes"):
        unpack(text)
    with pytest.raises(UserError, match="at most 1,000 bytes beside the weights, got 10,012"):
        pack({"zeros": "0" * 10_000})
