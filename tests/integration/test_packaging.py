"""Build the source distribution and the wheel, and install the wheel outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from fleet import CHECKOUT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "_*_temp"))
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
    )
    return folder


def test_the_sdist_has_all_that_is_needed_to_test_document_and_deploy(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CHANGELOG.rst",
        "CONTRIBUTING.rst",
        "LICENSE",
        "Makefile",
        "README.rst",
        "benchmarks/all.py",
        "deploy/systemd/wsgateway@.service",
        "docs/index.rst",
        "newsfragments/README.rst",
        "tap.cfg",
        "tests/__init__.py",
        "tests/integration/test_packaging.py",
        "tools/make_venv.sh",
    }
    assert wanted - names == set()
    assert [name for name in names if "__pycache__" in name or name.startswith("docs/_build")] == []


def test_the_wheel_brings_the_plugin_and_leaves_twisted_alone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"gateway", "twisted"}
    assert sorted(name for name in names if name.startswith("twisted/")) == [
        "twisted/plugins/wsgateway_endpoints.py",
        "twisted/plugins/wsgateway_plugin.py",
    ]
    assert any(name.startswith("gateway/registry/schema/sqlite/") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folder = tmp_path / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", wheel], check=True, env=environment)
    shown = subprocess.run(
        [folder / "bin" / "twistd", "--help"], check=True, capture_output=True, cwd=tmp_path, env=environment
    )
    assert b"wsgateway" in shown.stdout
    options = subprocess.run(
        [folder / "bin" / "twistd", "wsgateway", "--help"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=environment,
    )
    assert b"--max-calls-per-client" in options.stdout
    # The error about a missing parameter comes before any file is opened.
    endpoint = "from twisted.internet.endpoints import serverFromString as make; make(None, 'mtls:8443')"
    known = subprocess.run([python, "-c", endpoint], capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert b"clientCAs=FILE is missing" in known.stderr
