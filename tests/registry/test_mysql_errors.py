from __future__ import annotations

import ssl

import pymysql
from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.mysql import RETRYABLE_ERRORS, MySQLServer, explain, to_config_error
from gateway.settings import ConfigError

SERVER = MySQLServer("db.example", 3306, "gw", "fleet")


class ErrorTests(SynchronousTestCase):
    def test_what_may_pass(self) -> None:
        for code in (1205, 1213, 2003, 2006, 2013, 1053, 1047, 1290, 1792, 1836):
            self.assertIn(code, RETRYABLE_ERRORS)
        for code in (1045, 1049, 1062, 1064, 1146, 1406):
            self.assertNotIn(code, RETRYABLE_ERRORS)

    def test_one_line_for_the_log(self) -> None:
        error = pymysql.OperationalError(1205, "Lock wait\ntimeout exceeded")
        self.assertEqual(explain(SERVER, error), "db.example:3306/fleet: Lock wait timeout exceeded")
        self.assertEqual(
            explain(SERVER, pymysql.InterfaceError(0, "")), "db.example:3306/fleet: the connection was closed"
        )
        self.assertEqual(explain(SERVER, OSError("broken")), "db.example:3306/fleet: broken")
        self.assertEqual(explain(SERVER, ConfigError("registry", "no")), "--registry: no")
        for other in (ZeroDivisionError(), ValueError("x"), None):
            self.assertEqual(explain(SERVER, other), "")

    def said(self, error: BaseException, has_password: bool = True) -> str:
        told = to_config_error(SERVER, has_password, error)
        self.assertIsInstance(told, ConfigError)
        self.assertNotIn("\n", str(told))
        return str(told)

    def test_what_to_do(self) -> None:
        for code, text in (
            (1040, "too many connections"),
            (1044, "GRANT ALL ON fleet.* TO 'gw'"),
            (1049, "CREATE DATABASE fleet"),
            (1142, "GRANT ALL"),
            (1290, "name the server that can be"),
            (1836, "name the server that can be"),
            (2003, "cannot be reached"),
            (2026, "no TLS"),
            (1205, "cannot be used: said\u00b7so"),
        ):
            told = self.said(pymysql.OperationalError(code, "said\u00b7so"))
            self.assertTrue(told.startswith("--registry: db.example:3306/fleet "), told)
            self.assertIn(text, told)

    def test_passwords(self) -> None:
        for code in (1045, 1698):
            error = pymysql.OperationalError(code, "Access denied")
            self.assertIn("the password is wrong", self.said(error))
            self.assertIn("no password was given", self.said(error, False))

    def test_certificates(self) -> None:
        error = pymysql.OperationalError(2003, "Can't connect")
        error.original_exception = ssl.SSLError("self-signed")  # type: ignore[attr-defined]
        self.assertIn("no certificate that will do", self.said(error))

    def test_what_the_settings_say_stays(self) -> None:
        own = ConfigError("registry-password-file", "cannot be read")
        self.assertIs(to_config_error(SERVER, False, own), own)
        self.assertEqual(
            self.said(ConfigError("registry", "its tables are newer")),
            "--registry: db.example:3306/fleet: its tables are newer",
        )

    def test_something_else(self) -> None:
        self.assertIn("cannot be used: 'cryptography' package", self.said(RuntimeError("'cryptography' package")))
