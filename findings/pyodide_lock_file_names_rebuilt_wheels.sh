#!/usr/bin/env bash
# The pure-Python wheels that Pyodide's lock file names are not those of the package index.
#
# Version: pyodide 314.0.7 (npm), its pyodide-lock.json; wheels of the same names from PyPI.
# Expected: "six-1.17.0-py2.py3-none-any.whl" in the lock file is the file that pip downloads under
#   that name, since a wheel without compiled code is built once for all platforms. So whoever serves
#   Pyodide without its CDN fetches the listed names with pip and puts them beside it.
# Behaviour: Pyodide builds these packages again and lists the sha256 of its own wheels, which hold
#   the same modules in other bytes. In a browser Pyodide then refuses pip's file of the very name.
# Remedy: write the sha256 of the files that are served into the copy of the lock file.
# Seen: "six, decorator, parso, wcwidth: 4 of 4 sha256 differ, 4 of 4 hold the same modules".
set -euo pipefail
command -v npm >/dev/null || { echo 'needs npm'; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent pyodide@314.0.7 >/dev/null
tar xzf pyodide-314.0.7.tgz package/pyodide-lock.json
python3 -m venv venv
names='six decorator parso wcwidth'
for name in $names; do
  version=$(python3 -c "
import json, sys
print(json.load(open('package/pyodide-lock.json'))['packages'][sys.argv[1]]['version'])" "$name")
  venv/bin/pip download --quiet --no-deps --only-binary :all: "$name==$version"
done
python3 - $names <<'PYTHON'
import hashlib, json, sys, zipfile
from pathlib import Path

packages = json.load(open("package/pyodide-lock.json"))["packages"]
names = sys.argv[1:]
differ = same = 0
for name in names:
    entry = packages[name]
    wheel = Path(entry["file_name"])  # pip's file of the very same name
    differ += hashlib.sha256(wheel.read_bytes()).hexdigest() != entry["sha256"]
    modules = {n.partition("/")[0].removesuffix(".py") for n in zipfile.ZipFile(wheel).namelist()}
    same += set(entry["imports"]) <= modules
total = len(names)
print(f"{', '.join(names)}: {differ} of {total} sha256 differ, {same} of {total} hold the same modules")
sys.exit(differ != total or same != total)
PYTHON
