"""All benchmarks, one after the other: full sizes on a GPU, small ones that only show that they run on a CPU.

python -m benchmarks [autoscaling_sim] [channel] [conversation] [ends] [host] [ingress] [kernels] [load]
    [media_memory] [memory] [multi_gpu] [offline] [overload] [preparation] [routing] [scaling] [serve]
    [slow_hosts] [start] [step_parts] [steps] [streams] [tiles] [windows]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

#: Arguments on a GPU, and on a CPU.
BENCHMARKS = {
    "kernels": ("", ""),
    "channel": ("", "--answers 1,8 --tokens 50"),
    "conversation": ("--shape qwen3.5-4b", "--turns 3 --answer 8 --text 20"),
    "ends": ("", "--repeats 5"),
    "host": ("", "--steps 200"),
    "ingress": ("", "--rounds 2 --streams 5"),
    "load": ("--shape qwen2-vl-7b", "--shape tiny"),
    "memory": ("--shape qwen2-vl-2b", "--requests 200"),
    "multi_gpu": ("", ""),
    "offline": ("--shape qwen2-vl-2b", "--shape tiny"),
    "preparation": ("", "--replicas 1,2 --sizes 560x560 --seconds 1"),
    "media_memory": ("", "--requests 300"),
    "slow_hosts": ("", "--images 5 --rounds 1"),
    "start": ("--gpu --shape qwen2-vl-2b", "--starts 1"),
    "step_parts": ("--shape qwen2-vl-2b", "--answers 8 --steps 100 --cold-mib 0"),
    "steps": ("--shape qwen2-vl-7b --prompt-lookup 8", "--scale 64"),
    "streams": ("", "--streams 8 --tokens 100 --rounds 2"),
    "tiles": ("", ""),
    "windows": ("", "--contexts 32768 --gib 20"),
    "autoscaling_sim": ("", "--trace nightly"),
    "overload": ("", "--levels 1,10 --seconds 2 --rounds 1"),
    "routing": ("", "--requests 60 --replicas 2"),
    "scaling": ("", ""),
    "serve": (
        "--gpu --shape qwen2-vl-2b --rates 8,16,32 --requests 200 --preprocessors 4",
        "--shape tiny --rates 4,8 --requests 12",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="all if none is given")
    failed = []
    for name in parser.parse_args().names or BENCHMARKS:
        arguments = BENCHMARKS[name][0 if torch.cuda.is_available() else 1]
        print(f"== benchmarks.{name} {arguments}", flush=True)
        # Each in a process of its own: what one leaves on the device is no other's burden.
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
