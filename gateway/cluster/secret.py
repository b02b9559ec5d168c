"""The secret that the nodes of a fleet share: by it they know each other (credentials.py). It is never sent.

--cluster-secret-file FILE        what is in the file, without the white space around it
a sqlite: registry without it     what is in the file PATH.secret beside the database, where the other nodes of this
                                  machine find it too; it is made when a node first has something to prove
"""

from __future__ import annotations

import contextlib
import os
import stat

from twisted.logger import Logger

from gateway.settings import ConfigError, Settings

#: a secret has at least so many bytes, and its file at most
MIN_BYTES, MAX_BYTES = 16, 65536

_OPTION = "cluster-secret-file"


class Secret:
    """The secret of one file, kept in memory once it was read. Calling it gives the secret to check others by."""

    _log = Logger()

    def __init__(self, path: str, *, made_here: bool) -> None:
        """``made_here``: it may not be there yet, and is made when it is needed to sign.

        Raises :class:`~gateway.settings.ConfigError`.
        """
        self._path = path
        self._secret = b""
        if made_here:
            self()
        else:
            self._secret = self._read()

    @classmethod
    def of(cls, settings: Settings) -> Secret:
        """The secret that a node with these settings has. Raises :class:`~gateway.settings.ConfigError`."""
        if settings.cluster_secret_file:
            return cls(settings.cluster_secret_file, made_here=False)
        kind, _, path = settings.registry.partition(":")
        if kind != "sqlite":
            raise ConfigError(_OPTION, "is needed with a registry on a server, since its nodes are on several machines")
        return cls(f"{path}.secret", made_here=True)

    def __call__(self) -> bytes:
        """The secret, to check what another node has signed: empty where no node has made one yet.

        Raises :class:`~gateway.settings.ConfigError` for a file that will not do.
        """
        if not self._secret:
            with contextlib.suppress(FileNotFoundError):
                self._secret = self._read(may_be_missing=True)
        return self._secret

    def to_sign(self) -> bytes:
        """The secret, to sign with: it is made if there is none.

        Raises :class:`~gateway.settings.ConfigError` for a file that will not do, or cannot be made.
        """
        if not self():
            try:
                self._make()
            except OSError as e:
                problem = f"{self._path} cannot be made: {e.strerror or e}; give the file of a secret by this option"
                raise ConfigError(_OPTION, problem) from None
            self._secret = self._read()
        return self._secret

    def reload(self) -> None:
        """Read the file again, if it was read before; the old secret stays if that fails, with ``ConfigError``."""
        if self._secret:
            self._secret = self._read()

    def _read(self, *, may_be_missing: bool = False) -> bytes:
        try:
            with open(self._path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(MAX_BYTES + 1)
        except OSError as e:
            if may_be_missing and isinstance(e, FileNotFoundError):
                raise
            raise ConfigError(_OPTION, f"{self._path} cannot be read: {e.strerror or e}") from None
        secret = content.strip()
        if len(content) > MAX_BYTES or len(secret) < MIN_BYTES:
            found = f"more than {MAX_BYTES}" if len(content) > MAX_BYTES else len(secret)
            problem = f"{self._path} has {found} bytes; a secret has {MIN_BYTES} to {MAX_BYTES}, such as those of "
            raise ConfigError(_OPTION, f"{problem}`openssl rand -hex 32`")
        if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
            self._log.warn(
                "the cluster secret in {path} can be read by others than its owner; chmod 600 it", path=self._path
            )
        return secret

    def _make(self) -> None:
        """Put a new secret there, whole at once, unless another node does so at the same time."""
        made = f"{self._path}.{os.getpid()}-{os.urandom(4).hex()}"
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(os.urandom(32).hex().encode() + b"\n")
                file.flush()
                os.fsync(fd)
            # Unlike a rename, this fails where there is one already.
            with contextlib.suppress(FileExistsError):
                os.link(made, self._path)
        finally:
            os.unlink(made)
