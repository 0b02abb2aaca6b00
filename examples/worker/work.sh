#!/bin/sh
echo "working on job 1"
echo "job 1 failed: no such table" >&2
exit 3
