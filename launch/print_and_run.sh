#!/usr/bin/env bash
# Prints the command that it is given as it could be typed, and becomes it, unless DRY_RUN is set.
set -euo pipefail
typed=()
for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word=${word@Q}
    typed+=("$word")
done
echo "${typed[*]}"
if [[ -z ${DRY_RUN:-} ]]; then
    exec "$@"
fi
