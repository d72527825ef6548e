#!/usr/bin/env bash
# Would `dvc repro` have anything to do? Outputs are neither pulled nor made: their hashes in dvc.lock are enough.
# What `dvc add` keeps below data/local and models/local is pulled first, as its folder cannot be compared without it.
set -uo pipefail
cd "$(dirname "$0")/.."

inputs=$(git ls-files 'data/local/*.dvc' 'models/local/*.dvc')
if [ -n "$inputs" ]; then
    dvc pull --quiet --recursive data/local models/local || exit 1
fi
planned=$(dvc repro --dry --allow-missing 2>&1)
ended=$?
# Where what a stage needs is not there, DVC breaks off at it: a stage that is current is passed over before that.
stages=$(sed -n "s/^Running stage '\(.*\)':.*/\1/p; s/^ERROR: failed to reproduce '\([^']*\)'.*/\1/p" <<<"$planned")
if [ -n "$stages" ]; then
    echo "error: dvc.lock is not of what is committed: \`dvc repro\` would run $(head -n 1 <<<"$stages") first;" \
        "run \`make repro\` and commit dvc.lock and metrics" >&2
    exit 1
elif [ "$ended" != 0 ]; then
    echo "$planned" >&2
    exit "$ended"
fi
echo "dvc.lock is current: \`dvc repro\` would run nothing"
