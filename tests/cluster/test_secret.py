"""gateway.cluster.auth"""

from __future__ import annotations

import os
import stat
from unittest import mock

from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import MAX_SECRET_SIZE, MIN_SECRET_SIZE, ClusterSecret
from gateway.settings import ConfigError, Settings


class ClusterSecretCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, "secret")

    def write(self, content: bytes, mode: int = 0o600) -> None:
        with open(self.path, "wb") as file:
            file.write(content)
        os.chmod(self.path, mode)

    def problem(self, do) -> str:
        with self.assertRaises(ConfigError) as caught:
            do()
        text = str(caught.exception)
        self.assertTrue(text.startswith("--cluster-secret-file: "), text)
        self.assertNotIn("\n", text)
        return text


class SecretFileTests(ClusterSecretCase):
    """--cluster-secret-file"""

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, cluster_secret_file=self.path))

    def test_without_white_space(self) -> None:
        self.write(b"\n a secret of many words \xff\r\n")
        secret = self.load()
        self.assertEqual(secret(), b"a secret of many words \xff")
        self.assertEqual(secret.get_or_create(), secret())

    def test_sizes(self) -> None:
        for size, good in ((0, False), (MIN_SECRET_SIZE - 1, False), (MIN_SECRET_SIZE, True), (MAX_SECRET_SIZE, True)):
            self.write(b"x" * size)
            if good:
                self.assertTrue(self.load()())
            else:
                self.assertIn(f"has {size} bytes; a secret has {MIN_SECRET_SIZE} to", self.problem(self.load))
        self.write(b"x" * (MAX_SECRET_SIZE + 1))
        self.assertIn(f"more than {MAX_SECRET_SIZE} bytes", self.problem(self.load))

    def test_white_space_is_no_secret(self) -> None:
        self.write(b"x" + b" " * 40)
        self.assertIn("has 1 bytes", self.problem(self.load))

    def test_that_cannot_be_read(self) -> None:
        self.assertIn("No such file", self.problem(self.load))
        os.mkdir(self.path)
        self.assertIn("directory", self.problem(self.load))

    def test_read_by_others(self) -> None:
        for mode, warned in ((0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)):
            self.write(b"x" * 32, mode)
            with capturedLogs() as logs:
                self.load()
            self.assertEqual([log["log_level"] for log in logs], [LogLevel.warn] * warned, oct(mode))

    def test_reload(self) -> None:
        self.write(b"x" * 32)
        secret = self.load()
        self.write(b"y" * 32)
        self.assertEqual(secret(), b"x" * 32)
        secret.reload()
        self.assertEqual(secret(), b"y" * 32)
        self.write(b"short")
        self.problem(secret.reload)
        self.assertEqual(secret(), b"y" * 32)

    def test_needed_with_a_server(self) -> None:
        settings = mock.Mock(cluster_secret_file="", registry="mysql://gw@db/gw")
        self.problem(lambda: ClusterSecret.from_settings(settings))


class GeneratedSecretTests(ClusterSecretCase):
    """Beside a sqlite: registry"""

    def setUp(self) -> None:
        super().setUp()
        self.path += ".sqlite.secret"

    def load(self) -> ClusterSecret:
        return ClusterSecret.from_settings(Settings(capacity=9, registry="sqlite:" + self.path[: -len(".secret")]))

    def test_made_to_sign_alone(self) -> None:
        secret = self.load()
        self.assertEqual(secret(), b"")
        secret.reload()
        self.assertEqual(os.listdir(self.folder), [])
        made = secret.get_or_create()
        self.assertRegex(made, b"^[0-9a-f]{64}$")
        self.assertEqual(os.listdir(self.folder), [os.path.basename(self.path)])
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertEqual([secret(), secret.get_or_create()], [made, made])

    def test_mode_is_that_from_the_beginning(self) -> None:
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        opened = []
        real = os.open
        with mock.patch("gateway.cluster.auth.os.open", lambda *args: opened.append(args[1:]) or real(*args)):
            self.load().get_or_create()
        self.assertEqual(opened, [(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)])
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_others_find_it(self) -> None:
        first, second, late = self.load(), self.load(), self.load()
        made = first.get_or_create()
        self.assertEqual([second.get_or_create(), late(), self.load()()], [made] * 3)

    def test_made_by_another_at_the_same_time(self) -> None:
        secret = self.load()
        real = os.link

        def link(source: str, target: str) -> None:
            self.write(b"the other node's secret")
            real(source, target)

        with mock.patch("gateway.cluster.auth.os.link", link):
            self.assertEqual(secret.get_or_create(), b"the other node's secret")
        self.assertEqual(os.listdir(self.folder), [os.path.basename(self.path)])

    def test_nothing_is_left_of_a_failure(self) -> None:
        secret = self.load()
        with mock.patch("gateway.cluster.auth.os.link", side_effect=OSError(1, "Operation not permitted")):
            self.assertIn("cannot be made: Operation not permitted", self.problem(secret.get_or_create))
        self.assertEqual(os.listdir(self.folder), [])

    def test_folder_that_is_not_there(self) -> None:
        self.path = os.path.join(self.folder, "none", "registry.secret")
        self.assertIn("cannot be made: No such file", self.problem(self.load().get_or_create))

    def test_bad_file(self) -> None:
        self.write(b"short")
        self.assertIn("has 5 bytes", self.problem(self.load))
        os.unlink(self.path)
        secret = self.load()
        self.write(b"short")
        self.problem(secret)
        self.problem(secret.get_or_create)
