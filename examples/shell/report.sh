#!/bin/sh
# A one-off: sandbox run examples/shell -- ./report.sh a b
echo "arguments: $*"
echo "home: $HOME, memory: $(cat /sys/fs/cgroup/memory/memory.limit_in_bytes)"
wc -c
