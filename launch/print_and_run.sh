#!/usr/bin/env bash
# Prints the given command, quoted for a shell, and then executes it in place of itself, unless DRY_RUN is set.
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
