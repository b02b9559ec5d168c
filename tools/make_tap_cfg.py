"""Print tap.cfg: every option at its default, with its help as a comment.

python tools/make_tap_cfg.py > tap.cfg
"""

import textwrap

from gateway.tap import FIELDS


def entry(name: str) -> str:
    """Format one option: its help as a comment, its name and its default value."""
    metadata = FIELDS[name].metadata
    default = metadata["default"]
    text = metadata["help"] + (" One per line." if isinstance(default, tuple) else "")
    comment = textwrap.indent(textwrap.fill(f"{text} ({metadata['metavar']})", 116, break_on_hyphens=False), "# ")
    if isinstance(default, tuple):
        value = "".join(f"\n    {item}" for item in default)
    else:
        value = f" {default:g}" if isinstance(default, float) else f" {default}"
    return f"{comment}\n{name} ={value}".rstrip() + "\n"


print("# Every option of `twistd wsgateway` at its default; an empty value is the same as no value.")
print("# twistd wsgateway --config tap.cfg\n")
print("[wsgateway]\n")
print("\n".join(entry(name) for name in FIELDS), end="")
