"""A model of Azure Blob: the part of it that a store uses, for who signs, or has a SAS or a token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import quote
from xml.sax.saxutils import escape

from tests.integration.models import Answered, Asked, Server, Shelf, in_range

ACCOUNT = "tierblktest"
CONTAINER = "volumes"
KEY = base64.b64encode(b"the key of the tests, 64 bytes in life").decode()
TOKEN = "eyJ0.a-token-of-the-tests.x"
NAME_EXISTS = "BlobAlreadyExists"


class AzModel(Server):
    """tokens: which are valid now. refuses_with: (status, code) for a creation of what there is already.
    trouble: what every creation is answered with."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.shelf = Shelf()
        self.tokens = {TOKEN}
        self.refuses_with = (409, NAME_EXISTS)
        self.trouble: tuple[int, str] | None = None
        self.endpoint = f"{self.origin}/{ACCOUNT}"

    def sas(self, *, seconds: float = 3600, key: str = KEY) -> str:
        """A signed query, which this model alone understands."""
        ends = str(int(time.time() + seconds))
        signature = quote(_hmac(key, f"sas\n{ACCOUNT}\n{ends}"), safe="")
        return f"sv=2021-12-02&se={ends}&sp=rwdl&sig={signature}"

    def _answer(self, asked: Asked) -> Answered:
        headers = asked.headers
        if not headers.get("x-ms-version") or not headers.get("x-ms-date"):
            return _error(400, "MissingRequiredHeader")
        if abs(parsedate_to_datetime(headers["x-ms-date"]).timestamp() - time.time()) > 900:
            return _error(403, "AuthenticationFailed")
        refusal = self._refusal(asked)
        if refusal is not None:
            return refusal
        account, container, key = [*asked.path.removeprefix("/").split("/", 2), ""][:3]
        if (account, container) != (ACCOUNT, CONTAINER):
            return _error(404, "ContainerNotFound")
        match asked.method, bool(key):
            case "GET", False:
                return self._list(asked)
            case "GET", True:
                kept = self.shelf.get(key)
                if kept is None:
                    return _error(404, "BlobNotFound")
                status, body, more = in_range(kept, headers.get("range"))
                return Answered(status, body, more) if status != 416 else _error(416, "InvalidRange")
            case "PUT", True:
                return self._put(asked, key)
            case "DELETE", True:
                return Answered(202) if self.shelf.drop(key) else _error(404, "BlobNotFound")
        return _error(405, "UnsupportedHttpVerb")

    def _put(self, asked: Asked, key: str) -> Answered:
        if self.trouble is not None:
            return _error(*self.trouble)
        if asked.headers.get("x-ms-blob-type") != "BlockBlob":
            return _error(400, "MissingRequiredHeader")
        only_new = asked.headers.get("if-none-match") == "*"
        made = self.shelf.put(key, asked.body, only_new=only_new)
        return Answered(201) if made else _error(*self.refuses_with)

    def _refusal(self, asked: Asked) -> Answered | None:
        scheme, _, rest = asked.headers.get("authorization", "").partition(" ")
        if scheme == "Bearer":
            return None if rest in self.tokens else _error(401, "InvalidAuthenticationInfo")
        if scheme == "SharedKey":
            wanted = f"{ACCOUNT}:{_hmac(KEY, to_sign(asked))}"
            return None if hmac.compare_digest(rest, wanted) else _error(403, "AuthenticationFailed")
        ends = asked.word("se")
        good = _hmac(KEY, f"sas\n{ACCOUNT}\n{ends}") == asked.word("sig")
        if good and ends.isdigit() and int(ends) > time.time():
            return None
        return _error(403 if ends else 401, "AuthenticationFailed" if ends else "NoAuthenticationInformation")

    def _list(self, asked: Asked) -> Answered:
        if (asked.word("restype"), asked.word("comp")) != ("container", "list"):
            return _error(400, "InvalidQueryParameterValue")
        marker = asked.word("marker")
        # As the real one may, it stops a first time before it has found anything.
        page, more = self.shelf.page(asked.word("prefix"), marker.removeprefix("!")) if marker else ([], "!")
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties>"
            f"<Creation-Time>{formatdate(kept.born_unix_s, usegmt=True)}</Creation-Time>"
            f"<Last-Modified>{formatdate(kept.born_unix_s + 900, usegmt=True)}</Last-Modified>"
            f"<Content-Length>{len(kept.body)}</Content-Length><BlobType>BlockBlob</BlobType>"
            "</Properties></Blob>"
            for key, kept in page
        )
        text = (
            '\ufeff<?xml version="1.0" encoding="utf-8"?>'
            f'<EnumerationResults ServiceEndpoint="{self.endpoint}" ContainerName="{CONTAINER}">'
            f"<Blobs>{blobs}</Blobs><NextMarker>{escape(more)}</NextMarker></EnumerationResults>"
        )
        return Answered(200, text.encode())


def to_sign(asked: Asked) -> str:
    """What a signature is made of, from what arrived: written down from the reference, line by line."""
    got = asked.headers.get
    length = got("content-length", "")
    standard = (
        f"{asked.method}\n{got('content-encoding', '')}\n{got('content-language', '')}\n"
        f"{'' if length == '0' else length}\n{got('content-md5', '')}\n{got('content-type', '')}\n"
        f"{got('date', '')}\n{got('if-modified-since', '')}\n{got('if-match', '')}\n"
        f"{got('if-none-match', '')}\n{got('if-unmodified-since', '')}\n{got('range', '')}\n"
    )
    own = "".join(f"{name}:{asked.headers[name]}\n" for name in sorted(asked.headers) if name[:5] == "x-ms-")
    names = sorted({name.lower() for name, _ in asked.query})
    values = {name: ",".join(sorted(v for n, v in asked.query if n.lower() == name)) for name in names}
    return f"{standard}{own}/{ACCOUNT}{asked.raw_path}" + "".join(f"\n{n}:{values[n]}" for n in names)


def _hmac(key: str, text: str) -> str:
    digest = hmac.new(base64.b64decode(key), text.encode("utf-8"), hashlib.sha256).digest()
    return base64.b64encode(digest).decode("ascii")


def _error(status: int, code: str) -> Answered:
    body = f'\ufeff<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code></Error>'
    return Answered(status, body.encode(), {"x-ms-error-code": code})
