#!/usr/bin/env bash
# Trains on one machine, one process a GPU. Everything else is in the YAML.
#   PROCESSES=4 launch/one_box.sh --config configs/kdrl.yaml key=value …
set -euo pipefail
: "${PROCESSES:?wants the number of trainer processes, one a GPU, e.g. PROCESSES=4}"

# torchrun would keep one store for all its restarts, where restarted trainers find the addresses of their dead
# predecessors (torch 2.13); without the sharing they get a fresh one each time.
exec "$(dirname "$0")/print_and_run.sh" env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
    --max-restarts "${MAX_RESTARTS:-0}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
    -m rlkd.train run.resume=auto "$@" "trainer.devices=$PROCESSES" trainer.num_nodes=1
