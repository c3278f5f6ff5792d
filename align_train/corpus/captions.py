"""Alt-texts from the web to captions: what a reader of the page would have seen, on one line."""

import html
import re
import unicodedata
from html.entities import html5

ROUNDS = 5  # each undoes one level of escaping; two are the most among 10,000 alt-texts of the web

# An entity as HTML reads it in an attribute, where alt-texts come from: without the semicolon it is one only if
# neither a letter, a digit nor `=` follows, so that links keep their `&copy=1` (HTML standard, 13.2.5.73).
_ENTITY = re.compile(
    r"&(#(?:[xX][0-9a-fA-F]{1,9}+(?![0-9a-fA-F])|[0-9]{1,9}+(?![0-9]));?|[A-Za-z][A-Za-z0-9]*+(?:;|(?!=)))"
)

# Tags are known by name, and their attributes by an `=`: "CD4 < 350", "<3" and "<insert name>" are no tags.
_INLINE = "a|abbr|acronym|b|big|cite|del|em|font|i|ins|nobr|s|small|span|strike|strong|sub|sup|tt|u|wbr"
_BLOCK = "blockquote|br|center|dd|div|dl|dt|figcaption|h[1-6]|hr|iframe|img|li|ol|p|pre|table|tbody|td|th|thead|tr|ul"
_REST = r"(?:\s[^<>=]*+=[^<>]*+|\s*+/?)>"
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE}){_REST}", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK}){_REST}|<!--[^<>]*+>", re.IGNORECASE)

# Characters without a glyph that leave no gap: soft hyphen, zero-width space, marks of direction, tags, and joiners
# but between letters beyond ASCII, where they shape emoji and the scripts of Persia and India.
_INVISIBLE = re.compile(
    r"[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
    r"|(?<![^\x00-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200c\u200d])"
)
# Controls, lone surrogates, private use (icon fonts, bullets of Word) and what is no character.
_MEANINGLESS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]"
)


def clean_caption(text: str) -> str:
    """The text with entities decoded, tags and invisible characters removed, in Unicode's NFC, on one line.

    Entities (`&eacute;`, `&#39;`, `&amp;#39;`) are decoded until none is left, at most five levels deep. Then tags go
    whose names HTML knows: those that break a line, and comments, leave a space; others, `<b>` for instance, nothing.
    Zero-width characters are removed, controls and private use become spaces. Every run of white space is one space,
    with none at the ends. What is left may be empty.

    Cleaning a second time changes nothing, unless the text was escaped or nested more than five levels deep.
    """
    for _ in range(ROUNDS):
        before, text = text, _cleaned_once(text)
        if text == before:
            break
    return text


def _cleaned_once(text: str) -> str:
    if "&" in text:
        text = _ENTITY.sub(_character, text)
    if "<" in text:
        text = _BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", text))
    if not (text.isascii() and text.isprintable()):
        text = _MEANINGLESS.sub(" ", _INVISIBLE.sub("", text))
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def _character(entity: re.Match[str]) -> str:
    name = entity[1]
    return html.unescape(entity[0]) if name.startswith("#") else html5.get(name, entity[0])
