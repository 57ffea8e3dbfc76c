"""Text for messages: counts with their nouns."""


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun: "1 shard", "1,024 shards", "0 shards".

    `nouns` is the plural where it is not `noun` plus "s", as in `plural(2, "index", "indexes")`.
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {nouns or noun + 's'}"
