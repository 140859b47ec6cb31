#!/usr/bin/env bash
# Compares Lockstep with llama.cpp on this machine: same model file, same threads, interleaved runs.
# usage: peer.sh MODEL.gguf [prefill|decode|serve|scaling ...]     (default: all)
# Needs target/release/lockstep and .cache/llama/bin (benches/peer-llama.sh .cache/llama).
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(realpath "${1:?usage: peer.sh MODEL.gguf [prefill|decode|serve|scaling ...]}"); shift
what=${*:-prefill decode serve scaling}
threads=${THREADS:-2} runs=${RUNS:-5}
lockstep=target/release/lockstep llama=${LLAMA:-.cache/llama}/bin
ids=$(seq -s, 1000 1511)
rate='([\d.]+) tok/s'
llama_bench() {
  local last="tail -1 | awk -F'\",\"' '{print \$(NF-1)}'"
  echo "$llama/llama-bench -m $model -t $threads -r 1 -o csv $* 2>/dev/null | $last"
}
run() { echo "$lockstep run --model $model --temperature 0 --ignore-eos --json $*"; }

for part in $what; do
  echo "== $part"
  case $part in
    prefill) benches/ab.py -n "$runs" --ra "prefill $rate" \
               --a "$(run --threads "$threads" --prompt-ids "$ids" --max-tokens 1)" \
               --b "$(llama_bench -p 512 -n 0)" ;;
    decode)  benches/ab.py -n "$runs" --ra "decode $rate" \
               --a "$(run --threads "$threads" --prompt-ids 504 --max-tokens 128)" \
               --b "$(llama_bench -p 0 -n 128)" ;;
    scaling) benches/ab.py -n "$runs" --ra "decode $rate" --rb "decode $rate" \
               --a "$(run --tp 2 --threads 1 --prompt-ids 504 --max-tokens 128)" \
               --b "$(run --tp 1 --threads 1 --prompt-ids 504 --max-tokens 128)" ;;
    serve)   benches/serve.sh "$model" "$threads" "$runs" ;;
    *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
