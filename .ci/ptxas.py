"""Reads ptxas' report from a build log: prints registers of each kernel, fails where one uses local memory,
be it for spilled registers or for a stack frame, into which parameters are copied."""

import collections
import pathlib
import re
import sys

registers: dict[str, dict[str, int]] = collections.defaultdict(dict)
local = []
kernel = arch = ""
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
        kernel = re.sub(r"^_ZN4dxmi4cuda\d+|EEv.*$", "", match[1])
        arch = match[2]
    elif (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)) and (
        int(match[1]) or int(match[2])
    ):
        local.append(f"{kernel} {arch}: {line.strip()}")
    elif match := re.search(r"Used (\d+) registers", line):
        registers[kernel][arch] = int(match[1])
architectures = sorted({arch for row in registers.values() for arch in row})
print(f"{'registers':44}", *(f"{arch:>8}" for arch in architectures))
for kernel, row in sorted(registers.items()):
    print(f"{kernel:44}", *(f"{row.get(arch, '-'):>8}" for arch in architectures))
if len(architectures) < 3 or local:
    sys.exit(f"architectures: {architectures}, wants 3; local memory: {local}")
