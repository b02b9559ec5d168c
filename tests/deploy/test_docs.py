"""docs/deploy.rst names what is there."""

from __future__ import annotations

import re

from tests.deploy.case import DEPLOY, ROOT, DeployTestCase
from tests.deploy.test_aws import template
from tests.deploy.test_systemd import sysctls

TEXT = (ROOT / "docs/deploy.rst").read_text()


class Page(DeployTestCase):
    def test_files_exist(self) -> None:
        named = set(re.findall(r"\b(?:deploy|tests|benchmarks)/[A-Za-z0-9_@./-]*[A-Za-z0-9]", TEXT))
        self.assertGreater(len(named), 15)
        self.assertEqual([name for name in named if not (ROOT / name).exists()], [])

    def test_all_ways_to_install_have_the_extras_of_every_way_to_authenticate(self) -> None:
        installs = [
            (path.name, set(found.split(",")))
            for path in (ROOT / "docs/deploy.rst", DEPLOY / "aws/wsgateway.yaml", DEPLOY / "docker/Dockerfile")
            for found in re.findall(r"pip (?:install|wheel)[^\n]* '(?:\.|wsgateway)\[([a-z,]+)\]'", path.read_text())
        ]
        self.assertEqual(len(installs), 5)
        for name, extras in installs:
            self.assertLessEqual({"mysql", "jwt"}, extras, name)
            # On AWS, Route 53 is the name server.
            self.assertTrue(extras in ({"mysql", "aws", "jwt"}, {"mysql", "aws", "dns", "jwt"}), name)

    def test_every_folder_is_documented(self) -> None:
        for folder in DEPLOY.iterdir():
            self.assertIn(f"``deploy/{folder.name}``", TEXT)

    def test_kernel_settings_are_documented(self) -> None:
        for key in sysctls():
            name = key.rpartition(".")[2]
            self.assertTrue(name in TEXT or name == "ip_local_reserved_ports", key)

    def test_stack_parameters_without_default_are_given(self) -> None:
        given = set(re.findall(r"([A-Z][A-Za-z]+)=", TEXT.partition("--parameter-overrides")[2].partition("\n\n")[0]))
        wanted = {name for name, parameter in template()["Parameters"].items() if "Default" not in parameter}
        self.assertEqual(given, wanted | {"Prefix"})
