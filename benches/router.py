#!/usr/bin/env python3
"""What a router costs: chats, long prompts, streams, against a mock worker on this machine.

usage: router.py MODEL.gguf [--binary PATH]... [--rounds 5] [--seconds 3] [--only CASE,...]

Binaries of two versions take turns in each round; the first one's worker serves both. Prints the
median of each case and binary, and the ratio to the first. Needs `wrk`.
"""
import argparse, json, os, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
# name: clients, words, tokens, more arguments of router.lua
WRK = {
    "chat c=1": (1, 200, 1, []),
    "chat c=32": (32, 200, 1, []),
    "chat c=128": (128, 200, 1, []),
    "22 KB c=32": (32, 4_000, 1, []),
    "220 KB c=32": (32, 40_000, 1, []),
    "stream 64 c=32": (32, 20, 64, ["stream"]),
}
PACED = "paced 10 ms c=32"
# The same beside two clients whose prompts of 4,000 bytes are encoded between the streams' tokens.
BESIDE = "paced beside 4 KB c=2"
BESIDE_WRK = ["-c", "2", "-d", "60s"], ["mock", "640", "1"]


class Process:
    def __init__(self, *command):
        self.log = tempfile.TemporaryFile("w+")
        environment = {**os.environ, "LOCKSTEP_LOG": "info"}
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=self.log, stderr=self.log, env=environment)

    def wait_for(self, pattern, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.log.seek(0)
            text = self.log.read()
            if found := re.search(pattern, text):
                return found.group(1)
            if self.process.poll() is not None:
                sys.exit(f"ended early:\n{text}")
            time.sleep(0.05)
        sys.exit(f"no {pattern} within {seconds} s:\n{text}")

    def cpu(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wrk(router, url, model, case, seconds):
    clients, words, tokens, more = WRK[case]
    command = ["wrk", "-t", "1", "-c", str(clients), "-d", f"{seconds}s", "--timeout", "60s",
               "-s", str(HERE / "router.lua"), url, "--", model, str(words), str(tokens), *more]
    before = router.cpu()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = router.cpu() - before
    rate, p50, p99, count, failed = re.search(r"RESULT (.*)", out).group(1).split()
    if int(failed) or not int(count):
        sys.exit(f"{case}: {failed} failures\n{out}")
    measured = {"per_s": float(rate) * tokens, "p50_ms": float(p50), "p99_ms": float(p99),
                "cpu_us": spent / int(count) * 1e6}
    if words > 1000:
        measured["rss_mb"] = router.rss_mb()
    return measured


def beside(binary, router, url, model, seconds):
    flags, arguments = BESIDE_WRK
    with subprocess.Popen(["wrk", "-t", "1", *flags, "-s", str(HERE / "router.lua"), url, "--",
                           *arguments], stdout=subprocess.DEVNULL) as load:
        try:
            return paced(binary, router, url, model, seconds)
        finally:
            load.terminate()


def paced(binary, router, url, model, seconds):
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        tokens, clients = 64, 32
        requests = max(2, round(seconds / 0.7)) * clients
        before = router.cpu()
        subprocess.run([binary, "bench", "--url", url, "--model", model,
                        "--requests", str(requests), "--concurrency", str(clients),
                        "--prompt-tokens", "32", "--output-tokens", str(tokens),
                        "--json-out", out.name], capture_output=True, check=True)
        spent = router.cpu() - before
        report = json.load(out)
    if report["failed"]:
        sys.exit(f"{PACED}: {report['errors']}")
    gaps = report["inter_token_ms"]
    return {"per_s": report["output_tokens_per_second"], "p50_ms": gaps["p50"],
            "p99_ms": gaps["p99"], "cpu_us": spent / requests * 1e6}


def measure(binaries, binary, cases, model, seconds):
    results = {}
    for step, names in [(0, [case for case in cases if case in WRK]),
                        (10, [case for case in cases if case not in WRK])]:
        if not names:
            continue
        worker = Process(binaries[0], "worker", "--engine", "mock", "--model", model,
                         "--name", "mock", "--sequences", 256, "--context", 65536,
                         "--mock-step-ms", step, "--mock-token-us", 0,
                         "--listen", "127.0.0.1:0")
        address = worker.wait_for(r"ready worker=http://(\S+)")
        router = Process(binary, "router", "--workers", address, "--http", "127.0.0.1:0",
                         "--grpc", "127.0.0.1:0", "--grace-seconds", "0")
        url = router.wait_for(r"ready http=(\S+)")
        ask = [binary, "bench", "--url", url, "--model", "mock", "--requests", "64"]
        until = time.monotonic() + 60
        while subprocess.run(ask, capture_output=True).returncode:
            if time.monotonic() > until:
                sys.exit("the router does not serve")
            time.sleep(0.2)
        for case in names:
            if case in WRK:
                results[case] = wrk(router, url, "mock", case, seconds)
            else:
                run = paced if case == PACED else beside
                results[case] = run(binaries[0], router, url, "mock", seconds)
        router.end()
        worker.end()
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--binary", action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    binaries = arguments.binary or [str(HERE.parent / "target/release/lockstep")]
    only = [name for name in arguments.only.split(",") if name]
    cases = [*WRK, PACED, BESIDE]
    cases = [case for case in cases if not only or case.startswith(tuple(only))]
    rounds = {binary: [] for binary in binaries}
    for turn in range(arguments.rounds):
        for binary in binaries if turn % 2 == 0 else reversed(binaries):
            rounds[binary].append(measure(binaries, binary, cases, arguments.model,
                                          arguments.seconds))
            print(".", end="", file=sys.stderr, flush=True)
    print("\n| case | binary | per s | ratio | p50 ms | p99 ms | router CPU µs | RSS MB |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        first = None
        for at, binary in enumerate(binaries):
            def median(key):
                values = [result[case][key] for result in rounds[binary] if key in result[case]]
                return statistics.median(values) if values else None
            rate = median("per_s")
            first = first or rate
            rss = median("rss_mb")
            print(f"| {case} | {at + 1} | {rate:,.0f} | {rate / first:.2f} |"
                  f" {median('p50_ms'):.2f} | {median('p99_ms'):.2f} | {median('cpu_us'):,.0f} |"
                  f" {'' if rss is None else f'{rss:.0f}'} |")


main()
