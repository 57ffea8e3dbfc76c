"""A stand-in for an S3 bucket that is open to everyone, read-only. Unlike a real one, it refuses signed requests, so that a
test sees that none is made. Swift, the tests' S3 server, has no anonymous access in its S3 API."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

NAME = "public"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@dataclass
class PublicBucket:
    objects: dict[str, bytes]
    requester_pays: bool = False  # then requests must be signed, as on AWS, and say that they pay
    url: str = ""  # of the server
    refused: int = 0
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def public_bucket(objects: dict[str, bytes]) -> Iterator[PublicBucket]:
    """Serve s3://public with these objects; AWS_ENDPOINT_URL is for the caller to set."""
    bucket = PublicBucket(objects)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, size: int | None = None, **headers: str) -> None:
            self.send_response(status)
            length = len(body) if size is None else size
            for name, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def error(self, status: int, code: str) -> None:
            self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            bucket.requests.append(f"{self.command} {self.path}")
            pays = self.headers.get("x-amz-request-payer") == "requester"
            signed = "Authorization" in self.headers
            if (signed, pays) != (bucket.requester_pays, bucket.requester_pays):
                bucket.refused += 1
                return self.error(403, "AccessDenied")
            name, _, key = unquote(parts.path).lstrip("/").partition("/")
            if name != NAME:
                return self.error(404, "NoSuchBucket")
            if not key:
                return self.listing({k: v[0] for k, v in parse_qs(parts.query).items()})
            return self.object(key)

        do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.error(403, "AccessDenied")

        def object(self, key: str) -> None:
            if key not in bucket.objects:
                return self.error(404, "NoSuchKey")
            data = bucket.objects[key]
            meta = {"ETag": '"0"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                first, last = int(found[1]), min(int(found[2]), len(data) - 1)
                if first >= len(data):
                    return self.error(416, "InvalidRange")
                return self.answer(
                    206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **meta
                )
            return self.answer(200, data, **meta)

        def listing(self, query: dict[str, str]) -> None:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
            keys, folders = [], set()
            for key in sorted(k for k in bucket.objects if k.startswith(prefix)):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    keys.append(key)
            most = int(query.get("max-keys", 1000))
            contents = "".join(
                f"<Contents><Key>{escape(k)}</Key><Size>{len(bucket.objects[k])}</Size><ETag>0</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for k in keys[:most]
            )
            common = "".join(
                f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders)
            )
            self.answer(
                200,
                f"<ListBucketResult><Name>{NAME}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
                f"<IsTruncated>false</IsTruncated>{contents}{common}</ListBucketResult>".encode(),
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bucket.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, name="public bucket")
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
