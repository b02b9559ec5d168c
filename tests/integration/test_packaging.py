"""The wheel, installed where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from fleet import CHECKOUT


def test_the_wheel_brings_the_plugin_and_leaves_twisted_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "_*_temp"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.startswith("twisted/")) == [
        "twisted/plugins/wsgateway_endpoints.py",
        "twisted/plugins/wsgateway_plugin.py",
    ]
    assert any(name.startswith("gateway/registry/schema/sqlite/") for name in names)

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel], check=True, env=environment
    )
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
    # It needs no file to find out what is missing.
    endpoint = "from twisted.internet.endpoints import serverFromString as make; make(None, 'mtls:8443')"
    known = subprocess.run([python, "-c", endpoint], capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert b"clientCAs=FILE is missing" in known.stderr
