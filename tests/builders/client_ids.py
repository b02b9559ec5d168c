"""Client ids for tests: valid ones, and what proxies make of a path."""

from __future__ import annotations

import re

from hypothesis import strategies as st

CHARACTERS = "ABYZabyz0189._:@/+=-"

_segments = st.one_of(
    st.sampled_from(["...", ".a", "a.", "..a", "acme", "robot-7"]),
    # A scheme would need // behind it.
    st.text(CHARACTERS.replace("/", ""), min_size=1, max_size=20).filter(
        lambda text: text not in (".", "..") and not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*:", text)
    ),
)
_schemes = st.sampled_from(["spiffe://", "urn:", "a+b.c-1://"])
#: valid client ids
client_ids = st.builds(
    lambda scheme, segments: scheme + "/".join(segments),
    st.just("") | _schemes,
    st.lists(_segments, min_size=1, max_size=4),
)
#: texts of the characters of client ids, many of them with odd slashes and dots
client_id_parts = st.one_of(
    st.text(CHARACTERS, max_size=140),
    st.text("ab:/.", max_size=12),
    st.lists(st.sampled_from(["/", "//", ".", "..", "a", "b", "a:", "1:"]), max_size=8).map("".join),
)


def normalized(path: str) -> str:
    """Return a path as a proxy forwards it that merges slashes and removes dot segments (RFC 3986, section 5.2.4)."""
    segments: list[str] = []
    merged = re.sub("/+", "/", path)
    for segment in merged.split("/"):
        if segment == "..":
            del segments[max(1, len(segments) - 1) :]
        elif segment != ".":
            segments.append(segment)
    if merged.endswith(("/.", "/..")):
        segments.append("")
    return "/".join(segments)
