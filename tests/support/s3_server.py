"""A real S3 server on loopback for the tests and the demo: OpenStack Swift with its S3 API, in one folder.

    .venv-s3/bin/python tests/support/s3_server.py --dir DIR [--port N] -- CMD ...

runs CMD with the AWS_* variables set and the bucket `maestream` made, stops the server, and exits with CMD's
status. Without CMD it prints export lines, then `ready`, and runs until SIGTERM or Ctrl-C. What is stored
stays in DIR for the next start. Linux only; .venv-s3 is a venv of what requirements-s3.lock names.
"""

import argparse
import base64
import contextlib
import ctypes
import hmac
import http.client
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

HOST, REGION, BUCKET = "127.0.0.1", "us-east-1", "maestream"
ACCESS_KEY, SECRET_KEY = "test:tester", "testsecret1234"  # they open nothing but this server
STORAGE = ("account", "container", "object")  # the servers that keep data; the proxy before them speaks S3
START_SECONDS, STOP_SECONDS = 30, 10
OVERRIDES = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3")  # the caller's would beat what we set

LAUNCHER, LIBC, PR_SET_PDEATHSIG = os.getpid(), ctypes.CDLL(None), 1  # the 1: <sys/prctl.h>

Processes = dict[str, subprocess.Popen[bytes]]


def choose_ports(proxy_port: int) -> dict[str, int]:
    """A port for each server, in the order of start; 0 is any free one. OSError if `proxy_port` is taken."""
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        wanted = dict.fromkeys(STORAGE, 0) | {"proxy": proxy_port}
        sockets = {n: held.enter_context(socket.create_server((HOST, port))) for n, port in wanted.items()}
        return {name: sock.getsockname()[1] for name, sock in sockets.items()}


def config(name: str, port: int, folder: Path) -> str:
    """The same for all but name, port and pipeline; each server takes what concerns it."""
    # slo is for multipart uploads. Swift adds by itself what every proxy must have, such as copy.
    pipeline = "s3api tempauth slo proxy-server" if name == "proxy" else f"{name}-server"
    return f"""\
[DEFAULT]
bind_ip = {HOST}
bind_port = {port}
user = {pwd.getpwuid(os.getuid()).pw_name}
swift_dir = {folder}/etc
devices = {folder}/devices
mount_check = false
# No forks: each server is one process, which dies with the launcher.
workers = 0
# The log is stderr; port 9 discards what would go to the syslog as well.
log_level = WARNING
log_udp_host = {HOST}
log_udp_port = 9
# A busy machine is slow, not broken, and no daemon here repairs later what a time-out left half done: with
# the usual 1 s for the container update, an object could be stored and never be listed.
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000000
[pipeline:main]
pipeline = {pipeline}
[app:{name}-server]
use = egg:swift#{name}
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
location = {REGION}
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin
[filter:slo]
use = egg:swift#slo
"""


def write_config(folder: Path, ports: dict[str, int]) -> None:
    """DIR/etc: swift.conf, a conf for each server, and for each that keeps data a ring of one device."""
    from swift.common.ring import RingBuilder  # here, so that other venvs can import the constants above

    for name in ("etc", "log", "devices/disk"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.setxattr(folder, "user.maestream", b"")  # Swift needs them: on a file system without, fail now
    etc = folder / "etc"
    (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = maestream\n")
    for name, port in ports.items():
        (etc / f"{name}.conf").write_text(config(name, port, folder))
    for name in STORAGE:
        ring = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        ring.add_dev({"region": 1, "zone": 1, "ip": HOST, "port": ports[name], "device": "disk", "weight": 1})
        ring.rebalance()
        ring.get_ring().save(str(etc / f"{name}.ring.gz"))


def die_with_launcher() -> None:
    """In a child, before its program: have the kernel end it when the launcher ends, even by kill -9."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != LAUNCHER:  # it ended before the call
        os._exit(1)


def start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """One of Swift's servers. In a session of its own: Ctrl-C is for us, who stop them in order."""
    program = str(Path(sys.executable).with_name(f"swift-{name}-server"))
    command = [sys.executable, program, f"{folder}/etc/{name}.conf", "--verbose"]  # verbose: logs to stderr
    with (folder / "log" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_launcher
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL if that has not helped."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check(servers: Processes, folder: Path) -> None:
    """Exits with a message if a server has ended."""
    for name, process in servers.items():
        if process.poll() is not None:
            log = folder / "log" / f"{name}.log"
            sys.exit(f"s3_server: the {name} server ended with status {process.returncode}, see {log}")


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


def put_bucket(port: int) -> int:
    """The status. Signed the older way, which Swift takes as well as the newer and which is three lines."""
    date = formatdate(usegmt=True)
    digest = hmac.digest(SECRET_KEY.encode(), f"PUT\n\n\n{date}\n/{BUCKET}".encode(), "sha1")
    authorization = f"AWS {ACCESS_KEY}:{base64.b64encode(digest).decode()}"
    connection = http.client.HTTPConnection(HOST, port, timeout=START_SECONDS)
    connection.request("PUT", f"/{BUCKET}", headers={"Date": date, "Authorization": authorization})
    return connection.getresponse().status


def wait_until_up(servers: Processes, ports: dict[str, int], folder: Path) -> None:
    """Until all listen and the bucket is there. Exits with a message if that fails."""
    deadline = time.monotonic() + START_SECONDS
    while down := [name for name in servers if not is_listening(ports[name])]:
        check(servers, folder)
        if time.monotonic() > deadline:
            sys.exit(f"s3_server: after {START_SECONDS} s not up: {', '.join(down)}; see {folder}/log")
        time.sleep(0.05)
    status = put_bucket(ports["proxy"])
    if status not in (200, 409):  # 409: it is there from an earlier start
        sys.exit(f"s3_server: bucket {BUCKET} not created, status {status}; see {folder}/log")


def serve(folder: Path, port: int, command: list[str]) -> int:
    """The command's exit status as a shell gives it. Without a command, until a signal."""
    with contextlib.ExitStack() as stack:  # at the end it stops the command, the proxy, then the others
        ports, servers = choose_ports(port), Processes()
        write_config(folder, ports)
        for name in ports:
            servers[name] = start(name, folder)
            stack.callback(stop, servers[name])
        wait_until_up(servers, ports, folder)
        environment = {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['proxy']}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
        }
        process = None
        if command:
            # The terminal sends Ctrl-C to the command too, which decides. SIG_IGN it would inherit, this not.
            signal.signal(signal.SIGINT, lambda *_: None)
            inherited = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
            process = subprocess.Popen(command, env=inherited | environment, preexec_fn=die_with_launcher)
            stack.callback(stop, process)
        else:
            exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
            print(f"unset {' '.join(OVERRIDES)}", *exports, "ready", sep="\n", flush=True)
        while process is None or process.poll() is None:
            check(servers, folder)
            time.sleep(0.05)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main() -> int:
    """The exit status: the command's, or 1 with one message if the server does not run."""
    parser = argparse.ArgumentParser(description="Run CMD beside a real S3 server on loopback.")
    parser.add_argument("--dir", type=Path, required=True, help="for data, config and logs; made if missing")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("command", nargs="*", metavar="CMD", help="after --; none: serve until SIGTERM")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, and so stops the children
    folder = args.dir.resolve()
    try:
        return serve(folder, args.port, args.command)
    except (OSError, ImportError) as error:  # the folder, the port, the command; another venv's interpreter
        sys.exit(f"s3_server: {error}; logs, if it came that far: {folder}/log")


if __name__ == "__main__":
    sys.exit(main())
