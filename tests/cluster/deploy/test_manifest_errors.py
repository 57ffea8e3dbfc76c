"""`maestream manifests` refuses options that cannot work on a cluster, and secrets."""

import re
from pathlib import Path

import pytest

from tests.support.command_line import printed, refused
from tests.support.manifests import BASE, FINETUNE, ON_AWS, TINY, words_of


def test_secrets_of_the_environment_do_not_get_into_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        text = printed("manifests", target, *words_of(), *more)
        assert "EXAMPLE" not in text
        assert not re.search(
            r"(?i)secret|password|ssh_private_key|KeyName", text.replace("a Secret for it", "")
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            words_of(data="photos"),
            "--data photos: workers on other machines cannot read a local path: use an s3:// URL",
        ),
        (words_of(out="runs/base"), "--out runs/base: workers on other machines"),
        (words_of(out="file:///runs"), "--out file:///runs: workers on other machines"),
        (words_of(TINY, "knn={val: shards/val}"), "/shards/val: workers on other machines"),
        (
            words_of(FINETUNE, "--task", "finetune", "--init", "runs/base"),
            "/runs/base: workers on other machines",
        ),
        (words_of(FINETUNE, "--task", "finetune"), "init is missing: pass --init RUN"),
        (words_of(data="s3://bucket/$(id)"), "the URL passes through shells"),
        (words_of(BASE, "wrokers=3"), "unknown key wrokers: did you mean workers?"),
        (words_of("recipes/none.yaml"), "no such config"),
        (words_of(BASE, "--image", "an image"), "not a valid image name"),
        (
            words_of(BASE, "data.cache=cache", "data.cache_gb=1"),
            "data.cache cache: use an absolute path",
        ),
        (words_of(BASE, "checkpoint.snapshots=/mnt/ram"), "use a folder in /dev/shm"),
    ],
)
def test_invalid_options_are_refused(words: tuple[str, ...], expected: str) -> None:
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        message = refused("manifests", target, *words, *more)
        assert expected in message


@pytest.mark.parametrize(
    "words",
    [
        words_of(BASE, "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI"),
        words_of(BASE, "aws_access_key_id=x"),
        words_of(data="s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/photos"),
        words_of(out="s3://user:wJalrXUtnFEMI@bucket/runs"),
        words_of(BASE, "data.cache=/mnt/ASIAIOSFODNN7EXAMPLE", "data.cache_gb=1"),
    ],
)
def test_secrets_are_refused_and_not_repeated(words: tuple[str, ...]) -> None:
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        message = refused("manifests", target, *words, *more)
        assert "a manifest must not contain keys or passwords" in message
        assert "wJalrXUtnFEMI" not in message
        assert "EXAMPLE" not in message


def test_a_secret_in_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {cache: /mnt/AKIAIOSFODNN7EXAMPLE, cache_gb: 1}\n")
    assert "keys or passwords" in refused("manifests", "kuberay", *words_of(str(recipe)))


def test_invalid_options_of_one_target_are_refused() -> None:
    assert "--secret No_Name: not a valid name" in refused(
        "manifests", "kuberay", *words_of(), "--secret", "No_Name"
    )
    assert "--zone mars: expected a zone such as us-east-1a" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--zone", "mars"
    )
    assert "several of one region" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--zone", "us-east-1a,eu-west-1b"
    )
    assert "--machine a b: not a valid AWS name" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--machine", "a b"
    )
