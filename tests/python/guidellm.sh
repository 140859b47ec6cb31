#!/usr/bin/env bash
# The unmodified `guidellm` benchmark against a running router, with its defaults: chat, text, whole
# and streamed. Every request must succeed. By hand only: its packages (PyTorch with CUDA) are 6 GB.
# usage: tests/python/guidellm.sh [http://127.0.0.1:8000]
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:-http://127.0.0.1:8000}
venv=.cache/guidellm
[ -x $venv/bin/guidellm ] || {
  python3 -m venv $venv
  $venv/bin/python -m pip install -q guidellm==0.8.1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for n in 1 2 3 4 5 6; do
  # A small model may not end by itself.
  echo "{\"prompt\": \"What is $n?\", \"output_tokens_count\": 16}"
done >"$work/prompts.jsonl"
for format in /v1/chat/completions /v1/completions; do
  for stream in true false; do
    $venv/bin/guidellm run --disable-progress \
      --backend "kind=openai_http,target=$target,request_format=$format,stream=$stream" \
      --data "kind=json_file,path=$work/prompts.jsonl" \
      --profile kind=synchronous --constraint kind=max_requests,count=6 \
      --output "kind=json,path=$work/report.json" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    $venv/bin/python - "$work/report.json" "$format stream=$stream" <<'PYTHON'
import json
import sys

report = json.load(open(sys.argv[1]))
totals = report["benchmarks"][0]["metrics"]["request_totals"]
print(sys.argv[2], totals)
sys.exit(totals["successful"] != 6)
PYTHON
  done
done
