"""Secrets are found in commands and manifests, and hidden in reports and model cards."""

import pytest

from pipeline.secrets import has_secret, names_secret, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:pass-word@host/shards", "s3://…@host/shards"),
        ("see s3://me@host/a, https://host/b", "see s3://…@host/a, https://host/b"),
        ("s3://me:p@ss-word@host/a", "s3://…@host/a"),
        ("s3://anonymous@me:pass-word@host/a", "s3://…@host/a"),
        (
            "abfs://container:pass-word@account.dfs.core.windows.net/a",
            "abfs://…@account.dfs.core.windows.net/a",
        ),
        ("https://host/a?X-Amz-Signature=pass-word&part=1", "https://host/a?X-Amz-Signature=…&part=1"),
        ("https://host/a?part=1&access_token=pass-word'", "https://host/a?part=1&access_token=…'"),
        ("with AKIAABCDEFGHIJKLMNOP and", "with … and"),
        ("AWS_SECRET_ACCESS_KEY=pass-word", "AWS_SECRET_ACCESS_KEY=…"),
        ("aws_session_token: pass-word\nnext: 1", "aws_session_token: …\nnext: 1"),
        ('{"AWS_ACCESS_KEY_ID": "pass-word"}', '{"AWS_ACCESS_KEY_ID": …'),
    ],
)
def test_secrets_are_found_and_hidden(text: str, shown: str) -> None:
    assert has_secret(text)
    assert without_secrets(text) == shown
    assert "pass-word" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/photos@2026/shards",
        "s3://anonymous@bucket/photos",
        "see 's3://anonymous@bucket'",
        "abfs://container@account.dfs.core.windows.net/photos",
        "synthetic:?count=4096&classes=10",
        "registry.example/maestream:1@sha256:0123",
        "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "secretRef: {name: maestream}, mode: token",
    ],
)
def test_text_that_only_looks_like_a_secret(text: str) -> None:
    assert not has_secret(text)
    assert without_secrets(text) == text


def test_variable_names_that_mean_a_secret() -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "OPENAI_API_KEY", "apikey"):
        assert names_secret(name)
    for name in ("AWS_DEFAULT_REGION", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
        assert not names_secret(name)
