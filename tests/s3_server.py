"""A real S3 server on loopback for the tests and the demo: OpenStack Swift with its S3 API, in one folder.

    .venv-s3/bin/python tests/s3_server.py --dir DIR [--port N] -- CMD ...

runs CMD with the AWS_* variables set and the bucket `maestream` made, stops the server, and exits with CMD's
status. Without CMD it prints export lines, then `ready`, and runs until SIGTERM or Ctrl-C. What is stored stays
in DIR for the next start. Linux only; .venv-s3 is a venv with requirements-s3.lock and nothing else.
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

LAUNCHER = os.getpid()
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

SERVER_CONF = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
user = {user}
swift_dir = {folder}/etc
devices = {folder}/devices
recon_cache_path = {folder}/etc
mount_check = false
disable_fallocate = true
# No forks: each server is one process, which dies with the launcher.
workers = 0
# The log is stderr. Port 9 discards what would go to the machine's syslog as well.
log_level = WARNING
log_udp_host = {host}
log_udp_port = 9
# A busy machine is slow, not broken, and no daemon here repairs later what a time-out left half done: with the
# usual 1 s for the container update, an object could be stored and never be listed.
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000000
# Large chunks, and files left in the page cache: several times faster than the defaults.
disk_chunk_size = 1048576
network_chunk_size = 1048576
object_chunk_size = 1048576
client_chunk_size = 1048576
keep_cache_size = 1099511627776
keep_cache_private = true
[app:{name}-server]
use = egg:swift#{name}
account_autocreate = true
[pipeline:main]
"""

# slo is for multipart uploads. Swift adds by itself what every proxy must have, such as copy.
PROXY_PIPELINE = f"""\
pipeline = s3api tempauth slo proxy-server
[filter:s3api]
use = egg:swift#s3api
location = {REGION}
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin
[filter:slo]
use = egg:swift#slo
"""

Processes = dict[str, subprocess.Popen[bytes]]


class ServerError(Exception):
    """The server does not run; the message says why."""


def choose_ports(proxy_port: int) -> dict[str, int]:
    """A port for each server, in the order of start; 0 is any free one. OSError if `proxy_port` is taken."""
    with contextlib.ExitStack() as held:  # all at once, so that they differ
        wanted = dict.fromkeys(STORAGE, 0) | {"proxy": proxy_port}
        sockets = {n: held.enter_context(socket.create_server((HOST, port))) for n, port in wanted.items()}
        return {name: sock.getsockname()[1] for name, sock in sockets.items()}


def write_config(folder: Path, ports: dict[str, int]) -> None:
    """DIR/etc: swift.conf, a conf for each server, and for each that keeps data a ring of one device."""
    from swift.common.ring import RingBuilder  # here, so that other venvs can import the constants above

    for name in ("etc", "log", "devices/disk"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.setxattr(folder, "user.maestream", b"")  # Swift needs them: on a file system without, fail now
    etc, user = folder / "etc", pwd.getpwuid(os.getuid()).pw_name
    (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = maestream\n")
    for name, port in ports.items():
        conf = SERVER_CONF.format(host=HOST, port=port, user=user, folder=folder, name=name)
        pipeline = PROXY_PIPELINE if name == "proxy" else f"pipeline = {name}-server\n"
        (etc / f"{name}.conf").write_text(conf + pipeline)
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
    """One of Swift's servers, in a session of its own: Ctrl-C is for the launcher, which stops them in order."""
    program = Path(sys.executable).with_name(f"swift-{name}-server")
    command = [sys.executable, program, folder / "etc" / f"{name}.conf", "--verbose"]  # verbose: log to stderr
    with (folder / "log" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True, preexec_fn=die_with_launcher)  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check(servers: Processes) -> None:
    for name, process in servers.items():
        if process.poll() is not None:
            raise ServerError(f"the {name} server ended with status {process.returncode}")


def wait_until_listening(servers: Processes, ports: dict[str, int]) -> None:
    deadline = time.monotonic() + START_SECONDS
    for name, port in ports.items():
        while True:
            check(servers)
            with socket.socket() as sock:
                if sock.connect_ex((HOST, port)) == 0:
                    break
            if time.monotonic() > deadline:
                raise ServerError(f"the {name} server is not up after {START_SECONDS} s")
            time.sleep(0.05)


def create_bucket(port: int) -> None:
    """Signed the older way, which Swift takes as well as the newer and which is three lines."""
    date = formatdate(usegmt=True)
    digest = hmac.digest(SECRET_KEY.encode(), f"PUT\n\n\n{date}\n/{BUCKET}".encode(), "sha1")
    authorization = f"AWS {ACCESS_KEY}:{base64.b64encode(digest).decode()}"
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=START_SECONDS)) as connection:
        connection.request("PUT", f"/{BUCKET}", headers={"Date": date, "Authorization": authorization})
        status = connection.getresponse().status
    if status not in (200, 409):  # 409: it is there from an earlier start
        raise ServerError(f"bucket {BUCKET} cannot be created: status {status}")


def serve(folder: Path, port: int, command: list[str]) -> int:
    """The command's exit status as a shell gives it. Does not return without a command."""
    with contextlib.ExitStack() as stack:  # stops the command, then the proxy, then the others
        ports, servers = choose_ports(port), Processes()
        write_config(folder, ports)
        for name in ports:
            servers[name] = start(name, folder)
            stack.callback(stop, servers[name])
        wait_until_listening(servers, ports)
        create_bucket(ports["proxy"])
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
            check(servers)
            time.sleep(0.05)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Run CMD beside a real S3 server on loopback.")
    parser.add_argument("--dir", type=Path, required=True, help="for data, config and logs; made if missing")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("command", nargs="*", metavar="CMD", help="after --; none: serve until SIGTERM")
    args = parser.parse_args()
    folder = args.dir.resolve()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, and so stops the children
    try:
        return serve(folder, args.port, args.command)
    except (ServerError, OSError, http.client.HTTPException) as error:
        print(f"s3_server: {error}; logs: {folder}/log", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
