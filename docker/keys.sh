#!/usr/bin/env bash
# The service `keys` of compose.yaml: creates Ray's token and the object store's keys, once.
set -euo pipefail
cd /run/maestream
[ ! -e made ] || exit 0
umask 077
random() { python -c 'import secrets; print(secrets.token_hex(20))'; }
user=$(random) password=$(random)
random > auth_token
printf 'export MINIO_ROOT_USER=%s\nexport MINIO_ROOT_PASSWORD=%s\n' "$user" "$password" > minio.env
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$user" "$password" > credentials
touch made
