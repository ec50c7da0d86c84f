#!/bin/sh
# Builds our side, installs PyTorch's into an environment of its own (target/python), and measures both: against_pytorch.py,
# whose options it takes.
set -e
cd "$(dirname "$0")/../.."
cargo build --release --workspace --examples --locked
[ -e target/python/bin/python ] || python3 -m venv target/python
target/python/bin/python -m pip install --quiet --requirement host-api/python/tests/requirements.txt
exec target/python/bin/python dpt-plugin/benches/against_pytorch.py "$@"
