"""The command line as a user runs it, in a process of its own or in this one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock


def maestream(*words: object, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a user does."""
    command = [str(Path(sys.executable).with_name("maestream")), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=480, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def printed(*words: object) -> str:
    """What a command prints that succeeds, run in this process: it saves the seconds that imports take."""
    code, out, err = _in_this_process(words)
    assert code == 0, out + err
    return out


def refused(*words: object, process: bool = False, **environment: str) -> str:
    """The one message of a command that is refused: exit code 2, no traceback. In a process of its own if that is wanted,
    or needed; without, it saves the seconds that imports take."""
    if process or environment:
        done = maestream(*words, check=False, **environment)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = _in_this_process(words)
    assert code == 2, out + err
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1, err
    return err.strip()


def _in_this_process(words: tuple[object, ...]) -> tuple[object, str, str]:
    import ray

    from cluster.cli.main import main

    init = ray.init

    def connect(**options: object) -> object:
        # After a Ray cluster has been started inside a process, actors of its later connections to another cluster die.
        assert options["address"] != "local", (
            "run this command with the fixture on_one_ray, or by maestream()"
        )
        return init(**options)

    out, err, arguments = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["maestream", *map(str, words)]
    code: object = 0
    try:
        with (
            mock.patch.object(ray, "init", connect),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
    return code, out.getvalue(), err.getvalue()
