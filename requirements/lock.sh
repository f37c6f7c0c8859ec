#!/bin/sh
# Write constraints.txt anew: `make lock` keeps the pins that still fit, `make lock ARGS=--upgrade` takes the newest versions.
# One file serves every supported Python: where the newest release has left the oldest one behind, both versions are listed.
set -eu
cd "$(dirname "$0")/.."
lock=requirements/constraints.txt

uv pip compile pyproject.toml requirements/build.in --extra dev --extra quant --universal --python-version 3.10 \
    --no-annotate --no-header --quiet --output-file "$lock" "$@" >/dev/null

# torch is installed beforehand, and only its CUDA builds need the rest of these.
{
    echo "# Written by requirements/lock.sh from pyproject.toml and requirements/build.in."
    grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' "$lock"
} >"$lock.new"
mv "$lock.new" "$lock"
