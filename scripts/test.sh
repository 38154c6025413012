#!/usr/bin/env bash
# The default tests. First, in two processes, what fills one core; then, one by one, what fills two: real servers, and
# the page with all that it is made for.
# With arguments it is one pytest with these.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/python -m pytest)
(($#)) && exec "${pytest[@]}" "$@"

trap 'exit 130' INT  # Else Ctrl-C would only go on to the next part.
apart=(tests/ui/test_full_page.py)
for file in tests/live/test_*.py; do
  [ "$file" = tests/live/test_bad_input.py ] || apart+=("$file")
done
failed=()
part() {
  echo "== $1"
  "${pytest[@]}" "${@:2}" || failed+=("$1")
}

# In the order of the folders, so that engines that a folder shares are started once a process.
part "side by side" -n 2 --dist loadfile --no-loadscope-reorder "${apart[@]/#/--ignore=}"
part "one by one" "${apart[@]}"

if ((${#failed[@]})); then
  printf '== FAILED: %s\n' "${failed[@]}"
  exit 1
fi
