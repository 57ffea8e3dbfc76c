"""A network namespace on this machine, with a link to the other processes that can be cut (benchmarks.elasticity). Needs root."""

import os
import subprocess

HERE, THERE = "10.213.7.1", "10.213.7.2"  # addresses of the link's ends


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Link:
    """A namespace that exists from entering to leaving the context."""

    def __init__(self) -> None:
        self.namespace = f"maestream-{os.getpid()}"
        self.here, self.there = (
            f"mae{os.getpid()}a",
            f"mae{os.getpid()}b",
        )  # interfaces; names have at most 15 bytes

    def __enter__(self) -> "Link":
        ip("netns", "add", self.namespace)
        ip("link", "add", self.here, "type", "veth", "peer", "name", self.there, "netns", self.namespace)
        ip("address", "add", f"{HERE}/24", "dev", self.here)
        ip("link", "set", self.here, "up")
        for words in (
            f"address add {THERE}/24 dev {self.there}",
            f"link set {self.there} up",
            "link set lo up",
        ):
            ip("-netns", self.namespace, *words.split())
        return self

    def __exit__(self, *_: object) -> None:
        ip("link", "delete", self.here)
        ip("netns", "delete", self.namespace)

    def command(self, command: list[str]) -> list[str]:
        """A command that runs in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def cut(self) -> None:
        ip("link", "set", self.here, "down")

    def restore(self) -> None:
        ip("link", "set", self.here, "up")
