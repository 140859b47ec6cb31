#!/usr/bin/env bash
# 16 streaming clients against Lockstep and against llama-server, in turn, each freshly started.
# usage: [REQUESTS=2] serve.sh MODEL.gguf THREADS RUNS
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 threads=$2 runs=$3
llama=${LLAMA:-.cache/llama}/bin
load="-c 16 -r ${REQUESTS:-2} -w 96 -o 48"

# once NAME URL COMMAND...: starts the server, runs the load, prints the client's line, stops the
# server.
once() {
  local name=$1 url=$2; shift 2
  "$@" > "/tmp/serve-$name.log" 2>&1 & local pid=$!
  for _ in $(seq 300); do curl -fs "$url/health" > /dev/null && break; sleep 0.2; done
  # shellcheck disable=SC2086
  printf '%s ' "$name"; benches/serve_bench.py "$url" "$(basename "$model" .gguf)" $load
  kill "$pid"; wait "$pid" || true
}

for _ in $(seq "$runs"); do
  once lockstep http://127.0.0.1:18080 target/release/lockstep up --model "$model" \
    --threads "$threads" --http 127.0.0.1:18080 --grpc 127.0.0.1:18081
  once llama http://127.0.0.1:18082 "$llama/llama-server" -m "$model" -t "$threads" -np 16 \
    -c 16384 --host 127.0.0.1 --port 18082
done
