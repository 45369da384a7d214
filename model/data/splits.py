"""Splits by hash: a text's split depends on its words alone, so duplicates can never lie on both sides."""

import hashlib
import unicodedata

SPLITS = ("train", "valid", "test")


def normalized(text: str) -> str:
    """What is left of a text when case, width, spaces, punctuation and symbols are taken away."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


def fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the arguments alone, even over many texts."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(text: str, valid: float, test: float) -> str:
    """The split of `text` when shares of `valid` and `test` are held out."""
    place = fraction(normalized(text))
    return "test" if place < test else "valid" if place < test + valid else "train"
