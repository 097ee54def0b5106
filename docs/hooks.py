"""What the site needs beyond Markdown: links to files that are no pages become their names."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((?:\.\./|extending(?:/[^)]*)?\))[^)]*\)?")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Files of the repository that are not on the site are named, not linked."""
    return OUTSIDE.sub(lambda found: found[1], markdown)


ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings go; what they name stays as code."""
    return ROLE.sub("", html)
