#!/usr/bin/env bash
# Everything a change has to pass, from a fresh clone on a machine that has Python, pip and a package index.
# The quick checks come first; the first that fails ends the run. Each stage is a make target and can be run by hand.
set -euo pipefail
cd "$(dirname "$0")/.."

at_once=(make --no-print-directory --jobs=2 --output-sync=target)

stage() {
    local title=$1 began=$SECONDS
    shift
    printf '\n==> %s: %s\n' "$title" "$*"
    if ! "$@"; then
        printf '\n==> FAILED in "%s" after %d s. To see it again: %s\n' "$title" $((SECONDS - began)) "$*" >&2
        exit 1
    fi
    printf '==> %s: passed in %d s\n' "$title" $((SECONDS - began))
}

stage "Set-up" "${at_once[@]}" setup setup-gaudi
stage "Lint" make --no-print-directory lint
stage "Types and distribution" "${at_once[@]}" types check-dist setup-quantisers
stage "Tests" make --no-print-directory test
stage "Other quantisers" make --no-print-directory test-quantisers
stage "Gaudi without a Gaudi" make --no-print-directory test-gaudi
stage "Kernels" make --no-print-directory test-kernels
printf '\n==> All stages passed in %d s\n' "$SECONDS"
