"""Sphinx configuration."""

project = "wsgateway"
extensions: list[str] = []
exclude_patterns = ["_build"]
html_theme = "alabaster"
