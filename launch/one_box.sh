#!/usr/bin/env bash
# Trains on one machine, one process per GPU. Everything else is in the YAML.
#   PROCESSES=4 launch/one_box.sh --config configs/kdrl.yaml key=value …
set -euo pipefail
: "${PROCESSES:?expected the number of trainer processes, one per GPU, e.g. PROCESSES=4}"

# By default torchrun (torch 2.13) keeps one store for all its restarts, in which restarted trainers find the addresses of
# dead ones. With sharing disabled, each restart gets a new store.
exec "$(dirname "$0")/print_and_run.sh" env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
    --max-restarts "${MAX_RESTARTS:-0}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
    -m rlkd.train run.resume=auto "$@" "trainer.devices=$PROCESSES" trainer.num_nodes=1
