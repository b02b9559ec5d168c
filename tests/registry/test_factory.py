"""Tests of gateway.registry.factory."""

from __future__ import annotations

import os
import sys
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from gateway.metrics import Metrics
from gateway.registry.factory import PASSWORD_VARIABLE, make_registry, read_password
from gateway.registry.mysql import MySQLRegistry
from gateway.registry.sqlite import SQLiteRegistry
from gateway.settings import ConfigError
from tests.builders import mariadb


class FakeSettings:
    """The settings that make_registry() uses."""

    def __init__(self, registry: str, password_file: str = "") -> None:
        self.registry = registry
        self.registry_password_file = password_file
        self.lease = 15.0
        self.heartbeat = 5.0


class FactoryTests(SynchronousTestCase):
    def make(self, url: str, password_file: str = "") -> Any:
        settings: Any = FakeSettings(url, password_file)
        return make_registry(settings, reactor=Clock(), metrics=Metrics())

    def refused(self, url: str, password_file: str = "") -> str:
        text = str(self.assertRaises(ConfigError, self.make, url, password_file))
        self.assertNotIn("\n", text)
        return text

    def write(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def test_a_file(self) -> None:
        path = os.path.abspath(self.mktemp())
        registry = self.make(f"sqlite:{path}")
        self.assertIsInstance(registry, SQLiteRegistry)
        registry.check()
        self.assertTrue(os.path.exists(path))

    def test_a_server(self) -> None:
        registry = self.make(mariadb.server().new_database())
        self.assertIsInstance(registry, MySQLRegistry)
        registry.check()

    def test_an_unknown_scheme(self) -> None:
        self.assertIn("the path is missing", self.refused("sqlite:"))
        for url in ("", "registry.sqlite", "postgres://h/d", "a\nb:c", "MYSQL://gw@h/d"):
            text = self.refused(url)
            self.assertTrue(text.startswith("--registry: "), text)
            self.assertIn("write sqlite:PATH or mysql://user@host:3306/database", text)

    def test_an_invalid_url(self) -> None:
        self.assertIn("the database is missing", self.refused("mysql://gw@h"))

    def test_without_pymysql(self) -> None:
        name = "gateway.registry.mysql"
        self.addCleanup(sys.modules.__setitem__, name, sys.modules[name])
        sys.modules[name] = None  # type: ignore[assignment]
        self.assertIn("pip install 'wsgateway[mysql]'", self.refused("mysql://gw@h/d"))

    def test_the_password_comes_from_a_file_or_the_environment(self) -> None:
        self.patch(os, "environb", {PASSWORD_VARIABLE.encode(): b"from the environment"})
        self.assertEqual(read_password(""), b"from the environment")
        for content in (b"secret", b"secret\n", b"secret\r\n"):
            self.assertEqual(read_password(self.write(content)), b"secret")
        self.patch(os, "environb", {})
        self.assertEqual(read_password(""), b"")

    def test_an_invalid_password_file(self) -> None:
        url = "mysql://gw@h/d"
        self.assertIn("--registry-password-file: /nowhere cannot be read: No such file", self.refused(url, "/nowhere"))
        for content in (b"", b"\n", b"one\ntwo\n"):
            self.assertIn("the password in one line", self.refused(url, self.write(content)))
        self.assertIn("has more than 4096 bytes", self.refused(url, self.write(b"x" * 4097)))

    def test_the_password_is_read_for_each_connection(self) -> None:
        server = mariadb.server()
        url = server.new_database()
        name = url.rpartition("/")[2]
        server.execute(
            f"CREATE USER {name}@'127.0.0.1' IDENTIFIED BY 'one'", f"GRANT ALL ON {name}.* TO {name}@'127.0.0.1'"
        )
        self.addCleanup(server.execute, f"DROP USER {name}@'127.0.0.1'")
        path = self.write(b"one\n")
        registry = self.make(url.replace("root@", f"{name}@"), path)
        registry.check()
        server.execute(f"SET PASSWORD FOR {name}@'127.0.0.1' = PASSWORD('two')")
        self.assertIn("the password is wrong", str(self.assertRaises(ConfigError, registry.check)))
        with open(path, "wb") as file:
            file.write(b"two\n")
        registry.check()
