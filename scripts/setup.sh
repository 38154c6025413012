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
[ "$what" = dev ] && locks+=(requirements/dev.lock requirements/deploy.lock)
fail() { echo "setup: $1" >&2; exit 2; }

[ "$(uname -sm)" = "Linux x86_64" ] ||
  fail "the locked CPU set-up is for Linux on x86-64, this is $(uname -sm); on a GPU host: pip install '.[cuda]'"

stamp=.venv/.llumnix-$what
want=$(cat "$0" pyproject.toml "${locks[@]}" | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }
newest() { for p in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
  new_enough "$p" && { echo "$p"; return; }; done; }

if [ ! -e .venv ]; then
  python=$(newest) || true
  [ -n "$python" ] || fail "needs Python 3.11 or newer; set PYTHON to its path"
  echo "setup: making .venv with $("$python" --version)"
  trap 'rm -rf .venv; exit 130' INT TERM HUP  # Half a .venv would be taken for a whole one.
  "$python" -m venv .venv || {
    rm -rf .venv
    fail "$python cannot make .venv (its words are above); on Debian and Ubuntu: apt install python3-venv"
  }
  trap - INT TERM HUP
fi
new_enough .venv/bin/python ||
  fail ".venv has no Python 3.11 or newer; remove .venv and run this again"
.venv/bin/python -m pip --version >/dev/null 2>&1 ||
  fail ".venv has no pip; remove .venv and run this again"

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
if ! .venv/bin/python -c "from importlib.metadata import version as v; raise SystemExit(not v('torch').startswith('$torch'))" 2>/dev/null; then
  echo "setup: installing torch $torch (CPU, 200 MB)"
  # The plain name of the CPU build first, for a pip that knows where it is; then PyTorch's own index.
  if ! first=$(pip install --no-deps "torch==$torch+cpu" 2>&1) &&
     ! pip install --no-deps --index-url "$torch_index" "torch==$torch+cpu"; then
    echo "setup: before that, from pip's own index: ${first##*$'\n'}" >&2
    fail "torch's CPU build was not found; set TORCH_INDEX to an index that has it (tried: $torch_index)"
  fi
fi
echo "setup: installing ${locks[*]} (about 160 packages)"
lines=(); for lock in "${locks[@]}"; do lines+=(-r "$lock"); done
pip install --no-deps "${lines[@]}"
pip install --no-deps --no-build-isolation --editable .
echo "$want" > "$stamp"
echo "setup: done"
