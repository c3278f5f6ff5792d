"""The captions in a cell of a table: a text, a list of texts, or a list that a csv has as text."""

import ast
import io
import json
import tokenize
from collections.abc import Collection, Iterable, Mapping
from math import isnan
from typing import Any

from align_train.corpus.images import Unusable

LONGEST_LIST = 100_000  # characters of a cell that may be a list written as text
_BETWEEN = frozenset({"[", "]", "(", ")", ","})


def texts_of(cells: Mapping[str, Any], names: Iterable[str], listed: Collection[str] = ()) -> tuple[str, ...]:
    """The captions in the named cells; a list is several, and an empty cell (none, NaN, no letter) is none.

    Args:
        cells: of a row.
        names: of the columns.
        listed: those of `names` whose cells are lists written as text, see `listed_texts`.

    Raises:
        Unusable: `no_text`, for a cell of something else.
    """
    texts: list[str] = []
    for name in names:
        cell = cells.get(name)
        texts += (listed_texts(cell) if name in listed else []) or _texts(name, cell)
    return tuple(texts)


def listed_texts(cell: object) -> list[str]:
    """The texts of a list as JSON, Python or numpy prints it, such as "['a dog', 'a cat']"; none for another cell."""
    if not (isinstance(cell, str) and cell[:1] == "[" and cell[-1:] == "]" and len(cell) <= LONGEST_LIST):
        return []
    try:
        found = json.loads(cell)
        return found if all(isinstance(text, str) for text in found) else []
    except (ValueError, RecursionError):
        pass
    texts: list[str] = []
    try:  # by tokens: `literal_eval` of the whole would join the texts of numpy, which writes no commas
        for token in tokenize.generate_tokens(io.StringIO(cell).readline):
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string.strip() and token.string not in _BETWEEN:
                return []
    except (tokenize.TokenError, SyntaxError, ValueError):
        return []
    return texts if all(isinstance(text, str) for text in texts) else []


def is_text(cell: object) -> bool:
    """Whether a cell is a text or a list of texts, be it as Karpathy's {raw: text}."""
    if isinstance(cell, Mapping):
        return "raw" in cell and is_text(cell["raw"])
    return isinstance(cell, str) or (
        isinstance(cell, list) and all(each is None or (not isinstance(each, list) and is_text(each)) for each in cell)
    )


def is_empty(cell: object) -> bool:
    """Whether a cell says nothing: none, NaN, an empty text or list."""
    return cell is None or (isinstance(cell, float) and isnan(cell)) or (isinstance(cell, str | list) and not cell)


def _texts(name: str, cell: object, inside: bool = False) -> list[str]:
    if isinstance(cell, Mapping) and "raw" in cell:
        cell = cell["raw"]
    if is_empty(cell) and not (inside and cell == ""):  # the check counts an empty text among others
        return []
    if isinstance(cell, str | int | float):
        return [str(cell)]
    if isinstance(cell, list | tuple) and not inside:
        return [text for each in cell for text in _texts(name, each, inside=True)]
    raise Unusable("no_text", f"{name} holds {described(cell)}, and not a text or a list of texts")


def described(cell: object) -> str:
    """What kind of thing a cell is, for messages."""
    if isinstance(cell, Mapping):
        return f"a struct of {', '.join(map(str, cell)) or 'nothing'}"
    if isinstance(cell, list | tuple):
        return f"a list of {type(cell[0]).__name__}" if cell else "an empty list"
    return f"a number ({cell})" if isinstance(cell, int | float) else type(cell).__name__
