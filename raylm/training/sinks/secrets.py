"""Keeps credentials out of what is logged: trackers' clients put addresses and more into their messages."""

import os
import re

_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6
"""Shorter values of such variables are words that messages may hold by chance."""


def without_secrets(text: str) -> str:
    """`text` without what precedes the host of an address, and without the values of environment variables whose
    name says that they are secret."""
    text = re.sub(r"([\w+.-]+://)[^/\s'\"]*@", r"\1", text)
    secrets = [value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
