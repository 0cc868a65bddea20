#!/usr/bin/env bash
# Prints the command that it is given as it could be typed, and becomes it, unless DRY_RUN is set.
set -euo pipefail
printf '%q ' "$@"
printf '\n'
if [[ -z ${DRY_RUN:-} ]]; then
    exec "$@"
fi
