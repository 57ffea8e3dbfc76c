#!/usr/bin/env bash
# Of compose.yaml: builds a dataset of drawn scenes and trains on it, both across the containers of the workers, as jobs of
# their Ray; then leaves report and pictures in ~/demo.
set -euo pipefail
store=s3://maestream
job() { # that the cluster runs, and whose log is shown here
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
