#!/usr/bin/env bash
# `make demo`: generates images, pre-trains an MAE on two CPU cores and reconstructs images, in runs/demo.
# With STORE=s3 the dataset and the run are in a local S3 server, and the run is copied to runs/demo at the end.
set -euo pipefail
cd "$(dirname "$0")"

if [ "${STORE:-local}" = s3 ] && [ -z "${MAESTREAM_DEMO_S3:-}" ]; then
    rm -rf runs/demo-s3
    exec .venv-s3/bin/python tests/support/s3_server.py --dir runs/demo-s3 -- env MAESTREAM_DEMO_S3=1 bash demo.sh
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
# Kill one of its workers after 150 steps: the run has to recover.
.venv/bin/python -m tests.support.kill_worker $$ "$run" 150 &
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
from cluster.terminal.messages import event_line
from pipeline.storage.store import open_store
from trainer.run.events import read_events

print("\nEvents of the run:")
for event in read_events(open_store(sys.argv[1])):
    print(" ", event_line(event))
EOT
cat <<EOT

Reconstructions of held-out images:   runs/demo/pictures/held-out.png
Before and after training:            $first, $last
Samples of the training set:          runs/demo/pictures/dataset.png
Run folder:                           runs/demo (config.yaml, metrics.jsonl, checkpoints/, tensorboard/)
EOT
