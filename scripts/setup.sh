#!/usr/bin/env bash
# Makes .venv and installs the locked dependencies: `setup.sh` to serve, `setup.sh dev` to test too.
# Does nothing when nothing is to be done.
#   PYTHON       the interpreter to use (default: python3.11 or newer, the first found)
#   TORCH_INDEX  where torch's CPU build is looked for if pip does not find it by itself
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-serve}
torch=2.13.0
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
locks=(requirements/cpu.lock)
[ "$what" = dev ] && locks+=(requirements/dev.lock)

stamp=.venv/.llumnix-$what
want=$(cat "$0" pyproject.toml "${locks[@]}" | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

newest() { for p in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
  "$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$p"; return; }; done; }
python=$(newest)
[ -n "$python" ] || { echo "setup: needs Python 3.11 or newer; set PYTHON to its path" >&2; exit 2; }
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "setup: the locked CPU set-up is for Linux on x86-64; see README.md for others" >&2; exit 2
fi

[ -x .venv/bin/python ] || { echo "setup: making .venv with $("$python" --version)"; "$python" -m venv .venv; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
if ! .venv/bin/python -c "from importlib.metadata import version as v; raise SystemExit(not v('torch').startswith('$torch'))" 2>/dev/null; then
  echo "setup: installing torch $torch (CPU, 200 MB)"
  # The plain name of the CPU build first, for a pip that knows where it is; then PyTorch's own index.
  pip install --no-deps "torch==$torch+cpu" 2>/dev/null ||
    pip install --no-deps --index-url "$torch_index" "torch==$torch+cpu"
fi
echo "setup: installing ${locks[*]} (about 160 packages)"
lines=(); for lock in "${locks[@]}"; do lines+=(-r "$lock"); done
pip install --no-deps "${lines[@]}"
pip install --no-deps --no-build-isolation --editable .
echo "$want" > "$stamp"
echo "setup: done"
