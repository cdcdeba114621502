"""Plain text of the Wikipedia excerpt that the PyPI package gensim carries for its tests.

Articles of even place are for calibration, those of odd place for evaluation.
"""

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST_LINE, _SHORTEST_ARTICLE = 80, 2000  # characters
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>|\{\|.*?\n\|\}",
    re.DOTALL,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_FILE = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]")
_OUTSIDE = re.compile(r"\[https?:\S+ ?([^\]]*)\]")
_TAG = re.compile(r"<[^>]+>|'{2,}|&nbsp;")


def articles(path: Path) -> list[str]:
    """Return the plain text of all articles that are long enough, in the dump's order."""
    texts = (plain(source) for source in _sources(path))
    return [text for text in texts if len(text) >= _SHORTEST_ARTICLE]


def calibration_and_evaluation(path: Path) -> tuple[str, str]:
    """Return the two halves of the excerpt as text."""
    found = articles(path)
    return "\n\n".join(found[::2]), "\n\n".join(found[1::2])


def _sources(path: Path) -> Iterator[str]:
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}text"):
                yield element.text or ""
                element.clear()


def plain(source: str) -> str:
    """Strip wiki markup; headings, lists and other short lines go too."""
    text = _DROPPED.sub("", source)
    for pattern, kept in ((_TEMPLATE, ""), (_FILE, ""), (_LINK, r"\1")):
        count = 1
        while count:
            text, count = pattern.subn(kept, text)
    text = _TAG.sub("", _OUTSIDE.sub(r"\1", text))
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(
        line for line in lines if len(line) > _SHORTEST_LINE and line[0] not in "|!{*#"
    )
