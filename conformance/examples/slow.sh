#!/bin/sh
# A wrapper around another backend that does not come back once it is asked for numbers: what a hang looks like.
#
#     refspan check --backend "exec:sh conformance/examples/slow.sh" --level mask --timeout 2
read -r start
printf '%s\n' '{"version": 1, "name": "slow.sh", "operations": ["soft_mask"], "tensors": []}'
read -r request
echo "asked for a mask, and going to sleep" >&2
sleep 1000
