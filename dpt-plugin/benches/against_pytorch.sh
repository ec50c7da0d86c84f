#!/bin/sh
# Builds our side, installs PyTorch's into an environment of its own (target/python), and measures both on the CPU:
# against_pytorch.py, whose options it takes.
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$root/target/python/bin/python
(cd "$root" && cargo build --release --workspace --examples --locked)
[ -e "$python" ] || python3 -m venv "$root/target/python"
"$python" -m pip install --quiet --requirement "$root/host-api/python/tests/requirements.txt"
exec "$python" "$root/dpt-plugin/benches/against_pytorch.py" "$@"
