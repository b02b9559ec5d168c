"""What is said of AWS while it fails: each kind of failure once, and when it works again."""

from __future__ import annotations

from collections import Counter

from twisted.logger import Logger


class NameServiceError(Exception):
    """A name service did not do what it was asked; its text says why, in one line. ``throttled``: it asks to be asked
    less often; ``hopeless``: it will say the same until somebody changes something, such as rights or a zone."""

    def __init__(self, problem: str, *, throttled: bool = False, permanent: bool = False) -> None:
        self.throttled = throttled
        self.permanent = permanent
        super().__init__(problem)


class KeyFileError(Exception):
    """A key file that will not do. Its text says why, in one line, and nothing of what is in the file."""


#: so many kinds of failure are told in one stretch; codes of errors come from outside
MAX_LOGGED_KINDS = 16


class AwsError(Exception):
    """AWS, or the metadata service of its instances, did not do what it was asked. The text says why, in one line;
    ``kind`` is the same word for each failure of that sort."""

    def __init__(self, problem: str, *, kind: str) -> None:
        self.kind = kind
        super().__init__(problem)


class FailureLog:
    """Failures of one sort of request: counted under ``request``, and told as those of ``what``."""

    _log = Logger()

    def __init__(self, description: str, request: str, failures: Counter[str]) -> None:
        self._description = description
        self._request = request
        self._failures = failures
        self._logged_kinds: set[str] = set()

    def record_failure(self, error: AwsError) -> None:
        """It failed."""
        self._failures[self._request] += 1
        if error.kind not in self._logged_kinds and len(self._logged_kinds) < MAX_LOGGED_KINDS:
            self._logged_kinds.add(error.kind)
            self._log.warn("{what}: {problem}", what=self._description, problem=str(error))

    def record_success(self) -> None:
        """It worked."""
        if self._logged_kinds:
            self._logged_kinds.clear()
            self._log.info("{what}: works again", what=self._description)
