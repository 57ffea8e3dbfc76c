"""Find and hide passwords, access keys and signed URLs.

They must not appear in a job, manifest, report or model card, nor be stored in a config.
"""

import re

# Pattern → replacement text.
SECRETS = (
    # User names and passwords in URLs; but not s3://anonymous@bucket, nor abfs://container@account.
    (
        re.compile(
            r"(://)(?!(?:anonymous|(?<=abfs://)[\w-]+|(?<=abfss://)[\w-]+)@[^/\s@]*(?:[/\s'\"]|$))[^/\s]+@"
        ),
        r"\1…@",
    ),
    (re.compile(r"(?i)([?&][\w.-]*(?:token|sig|secret|key|passw|credential)[\w.-]*=)[^&\s'\"]+"), r"\1…"),
    (re.compile(r"(?i)(\baws_(?:access_key_id|secret_access_key|session_token)['\"]?\s*[=:]\s*)\S+"), r"\1…"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "…"),  # AWS access key ids
)
SECRET_NAME = re.compile(r"secret|token(?!izer)|passw|credential|access_key|api_?key", re.IGNORECASE)


def has_secret(text: str) -> bool:
    """Whether the text contains a password, an access key or a signed URL."""
    return any(pattern.search(text) for pattern, _ in SECRETS)


def without_secrets(text: str) -> str:
    """Return the text with each secret replaced by "…"."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def names_secret(variable: str) -> bool:
    """Whether a variable of this name (such as HF_TOKEN) is expected to hold a secret, whatever its value."""
    return bool(SECRET_NAME.search(variable))
