#!/usr/bin/env bash
# Markdown for a pull request: validation scores against another revision, and the gates. Exits as `lathe gate` does.
#   .github/summary.sh REVISION
set -euo pipefail
cd "$(dirname "$0")/.."

printf '### Validation scores against %s\n\n' "$1"
changes=$(dvc metrics diff --md "$1" --targets metrics/evaluate/summary.json)
if [ "$(wc -l <<<"$changes")" -le 2 ]; then # the head of the table alone
    changes="No score changed."
fi
printf '%s\n\n### Gates\n\n```\n' "$changes"
passed=0
python -m lathe gate || passed=$?
printf '```\n'
exit "$passed"
