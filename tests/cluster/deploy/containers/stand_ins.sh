#!/usr/bin/env bash
# For test_containers.py: builds replacements for images that cannot be pulled here, under the names that docker/ uses. A Debian
# with its own Python replaces python:3.11-slim-bookworm, OpenStack Swift replaces MinIO. Needs root and debootstrap.
set -euo pipefail
cd "$(dirname "$0")"
python=python:3.11-slim-bookworm
minio=$(sed -n 's/^ *image: \(minio.*\)/\1/p' ../../../../docker/compose.yaml)
have() { docker image inspect "$1" >/dev/null 2>&1; }

if ! have $python; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-pip,python3-venv bookworm "$root" \
        http://deb.debian.org/debian
    # As in Docker's own images: no caches, and pip may install packages. Also add this machine's certificates.
    echo 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";' > "$root/etc/apt/apt.conf.d/docker-clean"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    ln -s /usr/bin/python3 "$root/usr/local/bin/python"
    bundle=/etc/ssl/certs/ca-certificates.crt
    cp $bundle "$root$bundle"
    tar -C "$root" -c . | docker import -c "ENV PIP_CERT=$bundle SSL_CERT_FILE=$bundle REQUESTS_CA_BUNDLE=$bundle" - $python
fi
if ! have "$minio"; then
    cp ../../../support/s3_server.py ../../../../requirements-s3.lock minio
    DOCKER_BUILDKIT=1 docker build --network host -t "$minio" minio
    rm minio/s3_server.py minio/requirements-s3.lock
fi
