#!/usr/bin/env bash
# create_venv.sh PYTHON FOLDER: a virtual environment, or one line that says what is missing.
set -euo pipefail
python=$1 venv=$2
if ! command -v "$python" >/dev/null; then
  echo "meliad-edge: $python not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "meliad-edge: $("$python" --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
  else
    echo "meliad-edge: this Python cannot make virtual environments; run: sudo apt-get install python3-venv" >&2
    exit 1
  fi
fi
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --progress-bar off --upgrade pip
