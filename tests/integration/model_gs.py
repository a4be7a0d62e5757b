"""A model of Google's storage: the part of its XML interface that a store uses, for who has a valid token."""

from __future__ import annotations

from datetime import UTC, datetime
from xml.sax.saxutils import escape

from tests.integration.models import Answered, Asked, Server, Shelf, in_range

BUCKET = "tierblk-test"
TOKEN = "ya29.a-token-of-the-tests"


class GsModel(Server):
    """tokens: which are valid now."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.shelf = Shelf()
        self.tokens = {TOKEN}

    def _answer(self, asked: Asked) -> Answered:
        scheme, _, token = asked.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or token not in self.tokens:
            return _error(401, "AuthenticationRequired")
        bucket, _, key = asked.path.removeprefix("/").partition("/")
        if bucket != BUCKET:
            return _error(404, "NoSuchBucket")
        match asked.method, bool(key):
            case "GET", False:
                return self._list(asked)
            case "GET", True:
                kept = self.shelf.get(key)
                if kept is None:
                    return _error(404, "NoSuchKey")
                status, body, headers = in_range(kept, asked.headers.get("range"))
                return Answered(status, body, headers) if status != 416 else _error(416, "InvalidRange")
            case "PUT", True:
                condition = asked.headers.get("x-goog-if-generation-match")
                if condition not in (None, "0"):
                    return _error(400, "InvalidArgument")
                made = self.shelf.put(key, asked.body, only_new=condition == "0")
                return Answered(200) if made else _error(412, "PreconditionFailed")
            case "DELETE", True:
                return Answered(204) if self.shelf.drop(key) else _error(404, "NoSuchKey")
        return _error(405, "MethodNotAllowed")

    def _list(self, asked: Asked) -> Answered:
        if asked.word("list-type") != "2":
            return _error(400, "InvalidArgument")
        page, more = self.shelf.page(
            asked.word("prefix"), asked.word("continuation-token"), asked.word("start-after")
        )
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Generation>1</Generation>"
            f"<LastModified>{datetime.fromtimestamp(kept.born_unix_s, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3]
            + f"Z</LastModified><Size>{len(kept.body)}</Size></Contents>"
            for key, kept in page
        )
        goes_on = f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        return Answered(
            200,
            (
                "<?xml version='1.0' encoding='UTF-8'?>"
                "<ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
                f"<Name>{BUCKET}</Name><IsTruncated>{'true' if more else 'false'}</IsTruncated>"
                f"{contents}{goes_on}</ListBucketResult>"
            ).encode(),
        )


def _error(status: int, code: str) -> Answered:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    return Answered(status, body.encode())
