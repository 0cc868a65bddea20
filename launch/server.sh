#!/usr/bin/env bash
# Serves the policy or the teacher of a configuration to trainers on any machine, over TENSOR_PARALLEL × DATA_PARALLEL
# GPUs of this one. Wants RLKD_SERVER_KEY, the same as the trainers', unless HOST is a loopback address.
#   PORT=8000 TENSOR_PARALLEL=2 DATA_PARALLEL=4 launch/server.sh policy --config configs/kdrl.yaml key=value …
set -euo pipefail
role=${1:?wants policy or teacher, then --config X.yaml}
shift

exec "$(dirname "$0")/print_and_run.sh" \
    "${PYTHON:-python}" -m rlkd.serve --role "$role" --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" \
    --tensor-parallel "${TENSOR_PARALLEL:-1}" --data-parallel "${DATA_PARALLEL:-1}" "$@"
