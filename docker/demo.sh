#!/usr/bin/env bash
# The service `demo` of compose.yaml: builds a synthetic dataset and pre-trains on it, as Ray jobs that run in the worker
# containers. Then it writes a report and reconstructed images to ~/demo.
set -euo pipefail
store=s3://maestream
job() { # run a command on the cluster, and print its log here
    printf '\n$ maestream %s\n' "$*"
    ray job submit --address http://head:8265 -- maestream "$@"
}

python -c 'import s3fs; s3fs.S3FileSystem().makedirs("maestream", exist_ok=True)'
job shards build 'synthetic:?count=2048&classes=10' $store/data/train --shard-mb 16
job shards build 'synthetic:?count=64&classes=10&seed=1' $store/data/held-out
job pretrain --config recipes/demo.yaml --data $store/data/train --out $store/demo 'workers={min: 1, max: 2}'
mkdir -p ~/demo
maestream reconstruct $store/demo --data $store/data/held-out --grid ~/demo/held-out.png
maestream report $store/demo --out ~/demo/report.html
