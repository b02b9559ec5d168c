"""A document of another server, by HTTP or HTTPS: bounded in size and time.

-> GET /keys HTTP/1.1                  Accept: application/json
<- HTTP/1.1 200 OK, the document       anything else is a failure; no redirect is followed
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway import __version__, http_client
from gateway.tls_errors import explain_tls

#: seconds that it may take, from the look-up of the name on
TIMEOUT = 3.0
#: bytes of the longest document
MOST_BYTES = 1048576

#: characters of an error of elsewhere that stand in a log line
_LONGEST = 300


class FetchFailed(Exception):
    """There is no document. The text says why, in one line."""


def check_url(url: str) -> None:
    """Raises ``ValueError`` for a url by which nothing can be fetched safely."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it has characters that no url has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError("write https://host[:port]/path")
    if "@" in parts.netloc or "#" in url:
        raise ValueError("it has a user or a fragment")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("by http anybody on the way could give other keys; write https")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_query(url: str) -> str:
    """A url as it may be logged."""
    return url.partition("?")[0]


class Document:
    """What is at one url."""

    def __init__(self, reactor: Any, url: str) -> None:
        """Raises ``ValueError`` as :func:`check_url` does."""
        check_url(url)
        self._url = url.encode("ascii")
        self._reactor = reactor

    def fetch(self) -> Deferred[bytes]:
        """The document as it is now. Fails with :class:`FetchFailed`, or when it is cancelled."""

        def too_late(result: object, timeout: float) -> Failure:
            return Failure(FetchFailed(f"no answer within {timeout:g} s"))

        return Deferred.fromCoroutine(self._fetch()).addTimeout(TIMEOUT, self._reactor, too_late)

    async def _fetch(self) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": f"wsgateway/{__version__}"}
        try:
            answer = await http_client.request(
                self._reactor, b"GET", self._url, headers, timeout=TIMEOUT, most=MOST_BYTES
            )
        except http_client.TooLong:
            raise FetchFailed(f"the answer has more than {MOST_BYTES} bytes") from None
        except CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever becomes of connections
            raise FetchFailed(_one_line(e)) from None
        if answer.code != 200:
            redirect = ", a redirect" if 300 <= answer.code < 400 else ""
            raise FetchFailed(f"the answer is {answer.code}{redirect}")
        return answer.body


def _one_line(error: BaseException) -> str:
    """What a log line may have of an error."""
    explained = explain_tls(error)
    if explained:
        return explained
    # What Agent raises for an answer that it cannot read has no name that is public, or is Python's own.
    unreadable = isinstance(error, (ValueError, LookupError)) and not isinstance(error, UnicodeError)
    if unreadable or type(error).__module__ in ("twisted.web.http", "twisted.web._newclient"):
        return "its answer is no HTTP"
    text = ascii(" ".join(str(error).split()))[1:-1] or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
