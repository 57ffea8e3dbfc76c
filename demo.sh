#!/usr/bin/env bash
# make demo: from nothing to a trained MAE and a picture of what it sees, on two CPU cores.
# STORE=s3 does the same with dataset and run in a local S3 server, then brings the run to runs/demo.
set -euo pipefail
cd "$(dirname "$0")"

if [ "${STORE:-local}" = s3 ] && [ -z "${MAESTREAM_DEMO_S3:-}" ]; then
    rm -rf runs/demo-s3
    exec .venv-s3/bin/python tests/s3_server.py --dir runs/demo-s3 -- env MAESTREAM_DEMO_S3=1 bash demo.sh
fi

rm -rf runs/demo runs/demo-data
mkdir -p runs
if [ "${STORE:-local}" = s3 ]; then data=s3://maestream/data run=s3://maestream/demo; else data=runs/demo-data run=runs/demo; fi

maestream() {
    printf '\n$ maestream %s\n' "$*"
    .venv/bin/maestream "$@"
}

maestream shards build 'synthetic:?count=2048&classes=10' "$data/train" --shard-mb 16
maestream shards build 'synthetic:?count=64&classes=10&seed=1' "$data/held-out"
# In the middle of it one of its workers is killed.
.venv/bin/python tests/kill_a_worker.py $$ "$run" 150 &
maestream pretrain --config recipes/demo.yaml --data "$data/train" --out "$run"
wait
if [ "$run" != runs/demo ]; then
    .venv/bin/python -c 'import fsspec, sys; fsspec.filesystem("s3").get(sys.argv[1], "runs/demo", recursive=True)' "$run"
fi
maestream shards show "$data/train" --grid runs/demo/pictures/dataset.png
maestream reconstruct "$run" --data "$data/held-out" --grid runs/demo/pictures/held-out.png

first=$(ls runs/demo/pictures/step-*.png | head -1)
last=$(ls runs/demo/pictures/step-*.png | tail -1)
.venv/bin/python - "$run" <<'EOT'
import sys
from cluster.console import sentence
from pipeline.storage import open_store
from trainer.events import read_events

print("\nWhat became of its workers:")
for event in read_events(open_store(sys.argv[1])):
    print(" ", sentence(event))
EOT
cat <<EOT

What the model sees:      runs/demo/pictures/held-out.png   (images it never trained on)
Before and after:         $first, $last
What it was trained on:   runs/demo/pictures/dataset.png
The run:                  runs/demo                         (config.yaml, metrics, checkpoints/, tensorboard/)
EOT
