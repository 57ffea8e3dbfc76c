"""What no job, manifest, page or card may show, and no config keep: passwords, keys and signed URLs."""

import re

# Each with what is shown instead.
SECRETS = (
    (re.compile(r"(://)[^/\s]+@"), r"\1…@"),  # names and passwords in URLs
    (re.compile(r"(?i)([?&][\w.-]*(?:token|sig|secret|key|passw|credential)[\w.-]*=)[^&\s'\"]+"), r"\1…"),
    (re.compile(r"(?i)(\baws_(?:access_key_id|secret_access_key|session_token)['\"]?\s*[=:]\s*)\S+"), r"\1…"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "…"),  # ids of AWS's keys
)
NAME = re.compile(r"secret|token(?!izer)|passw|credential|access_key|api_?key", re.IGNORECASE)


def has_secret(text: str) -> bool:
    return any(pattern.search(text) for pattern, _ in SECRETS)


def without_secrets(text: str) -> str:
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


def names_secret(variable: str) -> bool:
    """Whether a variable of that name holds one, whatever it looks like."""
    return bool(NAME.search(variable))
