"""Tokens a second of one engine on the CPU, by how its OpenMP threads wait for each other, beside busy processes.

    uv run python benchmarks/waiting_threads.py [--model FOLDER] [--threads 2] [--busy 1] [--rounds 3]

Each round starts a process for each way, in turns, so that another load on the machine hits all. The ways are
`OMP_WAIT_POLICY` not set, PASSIVE (which instances have), and ACTIVE. Without --model, the demo model is used; if the
folder has only a config.json, the weights are invented. The script takes a minute and a half; each process generates
for --seconds.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

POLICIES = ("", "PASSIVE", "ACTIVE")
ENGINE = """
import sys, time, torch
from hbserve import LLM, SamplingParams
torch.set_num_threads(int(sys.argv[2]))
llm = LLM(sys.argv[1], num_kvcache_blocks=64, num_threads=int(sys.argv[2]), load_format=sys.argv[4])
ask = lambda count: llm.generate([[5, 6, 7, 8]], SamplingParams(0, count, ignore_eos=True), use_tqdm=False)
ask(2)
began_s, count = time.monotonic(), 0
while time.monotonic() < began_s + float(sys.argv[3]):
    ask(8)
    count += 8
print(count / (time.monotonic() - began_s))
"""
BUSY = "while True: pass"


def tokens_per_s(policy: str, args: argparse.Namespace, folder: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    environment["OMP_NUM_THREADS"] = str(args.threads)
    weights = "safetensors" if any(folder.glob("*.safetensors")) else "dummy"
    command = [sys.executable, "-c", ENGINE, str(folder), str(args.threads), str(args.seconds), weights]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=1, help="processes that only compute")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each process")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.model is None:
        from hbserve.models.demo_model import demo_model_path

        args.model = demo_model_path()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"{cores} cores, load {load:.1f} before; {args.threads} threads beside {args.busy} busy processes", flush=True
    )
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.busy)]
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    try:
        for _ in range(args.rounds):
            for policy, rates in found.items():
                rates.append(tokens_per_s(policy, args, args.model))
    finally:
        for each in busy:
            each.kill()
            each.wait()
    for policy, rates in found.items():
        row = " ".join(f"{rate:6.1f}" for rate in rates)
        print(f"OMP_WAIT_POLICY {policy or 'not set':8} {median(rates):6.1f} tokens/s   of {row}")


if __name__ == "__main__":
    main()
