"""deploy/docker, as far as it can be read without building it."""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import shlex

from gateway.settings import DEFAULT_BACKEND, DEFAULT_LISTEN
from tests.deploy.case import DEPLOY, ROOT, DeployTestCase, port_of

DOCKERFILE = DEPLOY / "docker/Dockerfile"
KEYWORDS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "HEALTHCHECK"}


def instructions() -> list[tuple[str, str]]:
    """What is in it: keyword and value."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(keyword, value) for keyword, _, value in (line.partition(" ") for line in lines) if keyword]


def values(keyword: str) -> list[str]:
    return [value for name, value in instructions() if name == keyword]


class Image(DeployTestCase):
    def test_every_line_is_an_instruction(self) -> None:
        self.assertLessEqual({keyword for keyword, _ in instructions()}, KEYWORDS)

    def test_copied_files_exist_and_are_in_the_context(self) -> None:
        sent = [
            line[1:] for line in (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
        ]
        copied = [source for value in values("COPY") for source in value.split()[:-1]]
        for source in copied:
            self.assertTrue((ROOT / source).exists(), source)
        self.assertEqual(sorted(copied), sorted(sent))
        # All that setuptools reads for the wheel.
        self.assertLessEqual({"setup.cfg", "pyproject.toml", "README.rst", "gateway", "twisted"}, set(copied))

    def test_ignored_files_are_not_needed(self) -> None:
        ignored = [
            line for line in (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[:2] == "**"
        ]
        needed = [path.name for path in (ROOT / "gateway").rglob("*") if path.suffix in (".py", ".sql", ".typed")]
        for pattern in ignored:
            self.assertEqual(fnmatch.filter(needed, pattern.removeprefix("**/")), [])

    def test_extras_exist(self) -> None:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        wanted = [set(found.split(",")) for run in values("RUN") for found in re.findall(r"\[([a-z,]+)\]", run)]
        self.assertEqual(len(wanted), 2)
        self.assertEqual(wanted[0], wanted[1])
        self.assertLessEqual(wanted[0], set(setup["options.extras_require"]))

    def test_python_version_is_supported(self) -> None:
        (python,) = values("ARG")
        self.assertIn(f"Python :: {python.removeprefix('PYTHON=')}\n", (ROOT / "setup.cfg").read_text())

    def test_signals_reach_the_node(self) -> None:
        (entrypoint,) = values("ENTRYPOINT")
        self.assertEqual(json.loads(entrypoint), ["twistd", "--nodaemon", "--pidfile=", "wsgateway"])
        self.assertEqual(values("STOPSIGNAL"), ["SIGTERM"])

    def test_node_accepts_the_options_of_the_example(self) -> None:
        head = re.sub(r"\\\n#\s*", "", DOCKERFILE.read_text())
        (run,) = re.findall(r"^# +docker run (.*)$", head, flags=re.MULTILINE)
        words = shlex.split(run)
        made = self.settings(words[words.index("wsgateway") + 1 :])
        self.assertEqual(port_of(made.listen[0]), int(words[words.index("-p") + 1].split(":")[1]))
        self.assert_stop_timeout(int(words[words.index("--stop-timeout") + 1]), made)
        self.settings([])

    def test_user_is_not_root(self) -> None:
        (user,) = values("USER")
        self.assertGreater(int(user), 0)
        self.assertIn(f"--uid {user} ", values("RUN")[-1])

    def test_ports_are_the_defaults(self) -> None:
        ports = [str(port_of(endpoint)) for endpoint in (*DEFAULT_LISTEN, *DEFAULT_BACKEND)]
        self.assertEqual(values("EXPOSE"), [" ".join(ports)])
        (check,) = values("HEALTHCHECK")
        program = json.loads(check[check.index("CMD ") + 4 :])
        self.assertEqual(program[:2], ["python", "-c"])
        compile(program[2], "HEALTHCHECK", "exec")
        self.assertIn(f"'http://127.0.0.1:{ports[1]}/healthz'", program[2])
