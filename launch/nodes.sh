#!/usr/bin/env bash
# Trains on several machines: run the same command on each of the NODES machines. HEAD is the name or address of one of
# them, where they meet. `run.dir` must be on a disk that all of them share.
#   NODES=2 PROCESSES=8 HEAD=10.0.0.1 launch/nodes.sh --config configs/kdrl.yaml key=value …
set -euo pipefail
: "${NODES:?expected the number of trainer machines, e.g. NODES=2}"
: "${PROCESSES:?expected the number of trainer processes on each machine, one per GPU, e.g. PROCESSES=8}"
: "${HEAD:?expected the name or address of one trainer machine, the same on all, e.g. HEAD=10.0.0.1}"

here=$(dirname "$0")
# By default torchrun and gloo advertise the address of this machine's host name, which is often 127.0.1.1.
found=$("${PYTHON:-python}" "$here/address.py" "$HEAD")
read -r address interface is_head <<<"$found"

# For the reason of TORCH_DISABLE_SHARE_RDZV_TCP_STORE see one_box.sh.
exec "$here/print_and_run.sh" env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    "GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}" "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}" \
    "${PYTHON:-python}" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${HEAD_PORT:-29400}" --rdzv-id "${RUN_ID:-rlkd}" \
    --rdzv-conf "${is_head:+is_host=$is_head,}read_timeout=600" --local-addr "$address" \
    --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
    -m rlkd.train run.resume=auto "$@" "trainer.devices=$PROCESSES" "trainer.num_nodes=$NODES"
