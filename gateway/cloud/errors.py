"""Exceptions of the cloud package, and the log of repeated AWS failures.

Exception
 +-- AwsError             a request to AWS or to the instance metadata service failed
 +-- NameServiceError     a request to a name service failed
 +-- KeyFileError         a TSIG key file cannot be used
"""

from __future__ import annotations

from collections import Counter

from twisted.logger import Logger


class AwsError(Exception):
    """A request to AWS or to the instance metadata service failed.

    The text is one line. ``kind`` is the same word for all failures of one sort, such as the error code of AWS.
    """

    def __init__(self, problem: str, *, kind: str) -> None:
        self.kind = kind
        super().__init__(problem)


class NameServiceError(Exception):
    """A request to a name service failed. The text is one line.

    ``throttled``: the service asks for fewer requests. ``permanent``: the request fails until the configuration
    changes, such as the permissions or the zone.
    """

    def __init__(self, problem: str, *, throttled: bool = False, permanent: bool = False) -> None:
        self.throttled = throttled
        self.permanent = permanent
        super().__init__(problem)


class KeyFileError(Exception):
    """A key file cannot be used. The text is one line and contains nothing of the file's content."""


#: kinds of failure that are logged until the next success; error codes come from outside
MAX_LOGGED_KINDS = 16


class FailureLog:
    """Count the failures of one request under ``request``; log each kind once until the request succeeds.

    ``description`` begins the log lines.
    """

    _log = Logger()

    def __init__(self, description: str, request: str, failures: Counter[str]) -> None:
        self._description = description
        self._request = request
        self._failures = failures
        self._logged_kinds: set[str] = set()

    def record_failure(self, error: AwsError) -> None:
        self._failures[self._request] += 1
        if error.kind not in self._logged_kinds and len(self._logged_kinds) < MAX_LOGGED_KINDS:
            self._logged_kinds.add(error.kind)
            self._log.warn("{what}: {problem}", what=self._description, problem=str(error))

    def record_success(self) -> None:
        if self._logged_kinds:
            self._logged_kinds.clear()
            self._log.info("{what}: works again", what=self._description)
