#!/usr/bin/env bash
# Serves the policy or the teacher of a configuration to trainers on any machine, on TENSOR_PARALLEL × DATA_PARALLEL GPUs of
# this machine. Trainers and server need the same RLKD_SERVER_KEY. HOST is the address of this machine. If you set HEAD
# instead (the name or address of a trainer machine), the script uses the address that leads there.
#   HEAD=10.0.0.1 TENSOR_PARALLEL=2 DATA_PARALLEL=4 launch/server.sh policy --config configs/kdrl.yaml key=value …
set -euo pipefail
role=${1:?expected policy or teacher, then --config X.yaml}
here=$(dirname "$0")
network=${HOST:-${HEAD:?expected the address of a trainer machine, e.g. HEAD=10.0.0.1; or set HOST, the address of this machine}}
found=$("${PYTHON:-python}" "$here/address.py" "$network")
read -r address interface _ <<<"$found"

# As in nodes.sh: weights sent by NCCL must take the same network at both ends.
exec "$here/print_and_run.sh" env "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}" \
    "${PYTHON:-python}" -m rlkd.serve --role "$role" --host "${HOST:-$address}" --port "${PORT:-8000}" \
    --tensor-parallel "${TENSOR_PARALLEL:-1}" --data-parallel "${DATA_PARALLEL:-1}" "${@:2}"
