"""The XML in a store's answers: codes of errors, and the pages of a listing as S3 and Google write them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import datetime

from tierblk.errors import RemoteMismatch
from tierblk.remote.exchange import Answer


@dataclass(frozen=True, slots=True)
class Page:
    """objects: (key, bytes, Unix time of creation), by key. token: where the next page begins; None: this is
    the last."""

    objects: list[tuple[str, int, float]]
    token: str | None


def parsed(body: bytes) -> ElementTree.Element | None:
    """XML without a document type, which no answer of a store has and which can make a parser grow (I12)."""
    if b"<!" in body:
        return None
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return None


def namespace(tree: ElementTree.Element) -> str:
    """What the names of its elements begin with. Each vendor has another, some have none."""
    return tree.tag[: tree.tag.index("}") + 1] if tree.tag.startswith("{") else ""


def error_code(answer: Answer) -> str:
    """The word for what is wrong; empty when the answer has none. Letters and digits only."""
    if answer.status < 400:
        return ""
    tree = parsed(answer.body)
    code = "" if tree is None else (tree.findtext("Code") or tree.findtext(f"{namespace(tree)}Code") or "")
    return plain(code)


def plain(code: str) -> str:
    """A code from a server as messages may show it."""
    return "".join(letter for letter in code[:60] if letter.isalnum())


class BucketWords:
    """The part of a Dialect that S3 and Google's XML interface have in common."""

    __slots__ = ()

    @property
    def empty_pages_max(self) -> int:
        """See Dialect: a page has something, or it is the last."""
        return 0

    def code(self, answer: Answer) -> str:
        """See Dialect."""
        return error_code(answer)

    def is_there_already(self, answer: Answer) -> bool:
        """See Dialect."""
        return answer.status == 412

    def is_missing_bucket(self, answer: Answer) -> bool:
        """See Dialect."""
        return error_code(answer) == "NoSuchBucket"

    def is_unknown(self, answer: Answer) -> bool:
        """See Dialect: with 400, the body did not arrive in time."""
        return error_code(answer) == "RequestTimeout"

    def listing_query(self, prefix: str, after: str, token: str | None) -> list[tuple[str, str]]:
        """See Dialect."""
        query = [("list-type", "2"), ("prefix", prefix)]
        if after:
            query.append(("start-after", after))
        if token:
            query.append(("continuation-token", token))
        return query

    def page(self, body: bytes, asked: str) -> Page:
        """See Dialect."""
        return _page(body, asked)


def _page(body: bytes, asked: str) -> Page:
    """A page of what list-type=2 brings."""
    tree = parsed(body)
    if tree is None:
        raise RemoteMismatch(f"{asked}, but the answer is no listing")
    space = namespace(tree)
    try:
        objects = [
            (
                item.findtext(f"{space}Key") or "",
                int(item.findtext(f"{space}Size") or ""),
                datetime.fromisoformat(item.findtext(f"{space}LastModified") or "").timestamp(),
            )
            for item in tree.iterfind(f"{space}Contents")
        ]
    except (ValueError, OverflowError):
        raise RemoteMismatch(f"{asked}, but the answer is no listing that can be read") from None
    token = tree.findtext(f"{space}NextContinuationToken")
    if tree.findtext(f"{space}IsTruncated") == "true" and not token:
        raise RemoteMismatch(f"{asked}, but the listing goes on without saying where")
    return Page(objects, token if tree.findtext(f"{space}IsTruncated") == "true" else None)
