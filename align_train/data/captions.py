"""Which of a pair's texts is its caption."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align_train.corpus.captions import clean_caption
from align_train.corpus.images import Unusable


@dataclass(frozen=True)
class Captions:
    """Where captions come from.

    Attributes:
        fields: probability of each field, relative to the others. `txt` is the file `key.txt` (any extension will do),
            `json.alt` the value named alt in `key.json`. Where the drawn field is missing or empty, another is drawn.
        clean: decode HTML entities, remove tags and invisible characters, see `corpus.captions.clean_caption`.
        by_line: each line of a field is a caption, one of which is drawn; else all of it is one.

    Raises:
        ValueError: no field, a probability that is none, or a field that is no caption's.
    """

    fields: Mapping[str, float] = field(default_factory=lambda: {"txt": 1.0})
    clean: bool = True
    by_line: bool = False

    def __post_init__(self) -> None:
        for name, probability in self.fields.items():
            if isinstance(probability, bool) or not isinstance(probability, int | float) or not probability > 0:
                raise ValueError(f"captions.{name} is {probability!r}: give a probability over 0, or leave it out")
            if not all(name.split(".")) or name == "json":
                raise ValueError(f"captions has the field {name!r}: write txt, or json.NAME for a value of the json")
        if not self.fields:
            raise ValueError("captions names no field: write {txt: 1.0}")

    @property
    def kinds(self) -> list[str]:
        """Kinds of members that hold the fields."""
        return list(dict.fromkeys(_kind_and_key(name)[0] for name in self.fields))

    def choose(self, texts: Mapping[str, bytes], random: np.random.Generator | None, where: str) -> str:
        """The caption, from the members by kind; without random numbers, of the most probable field the first line.

        Raises:
            Unusable: no_caption where no field is there, empty_caption where none says anything, corrupt_json.
        """
        reason = "no_caption"
        for name in self._drawn(random):
            kind, key = _kind_and_key(name)
            if (text := _text(texts.get(kind), key, where)) is None:
                continue
            if lines := self._lines(text):
                return lines[int(random.integers(len(lines))) if random and len(lines) > 1 else 0]
            reason = "empty_caption"
        raise Unusable(reason, where)

    def _lines(self, text: str) -> list[str]:
        """The captions that a field holds, without empty ones."""
        parts = text.splitlines() if self.by_line else [text]
        cleaned = (clean_caption(part) if self.clean else part.strip() for part in parts)
        return [part for part in cleaned if part]

    def _drawn(self, random: np.random.Generator | None) -> list[str]:
        """All fields, in the order in which they were drawn without replacement."""
        if random is None or len(self.fields) == 1:
            return sorted(self.fields, key=lambda name: -self.fields[name])
        weights = np.array(list(self.fields.values()), float)
        return list(random.choice(list(self.fields), len(self.fields), replace=False, p=weights / weights.sum()))


def _kind_and_key(name: str) -> tuple[str, str]:
    """A field's kind of member, and the name of the value in it, where it is json."""
    return ("json", name.removeprefix("json.")) if name.startswith("json.") else (name, "")


def _text(content: bytes | None, key: str, where: str) -> str | None:
    """The text of a member, or of a value in it; None where it is not there."""
    if content is None:
        return None
    if not key:
        return content.decode("utf-8", "replace")
    value = read_json(content, where).get(key)
    return value if isinstance(value, str) else None if value is None else str(value)


def read_json(content: bytes, where: str) -> dict[str, Any]:
    """A pair's metadata; Unusable as corrupt_json where it is none."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable("corrupt_json", f"{where} ({error})") from error
    if not isinstance(document, dict):
        raise Unusable("corrupt_json", f"{where} is {type(document).__name__}, not an object")
    return document
