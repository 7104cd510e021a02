#!/usr/bin/env bash
# Pyodide's loadPackage succeeds where the wheel is not there.
#
# Version: pyodide 314.0.7 (npm); Node.js 20.
# Expected: `await pyodide.loadPackage(address)` fails where the server answers 404, as
#   `pyodide.loadPackage("a name that nobody knows")` does, so that a page can say so.
# Behaviour: the promise of an unknown name is rejected; that of an address that answers 404 (or of a
#   known name whose wheel is missing) resolves, with a list that lacks the package. The error goes to
#   `errorCallback`, by default to the console; what fails, later and elsewhere, is the import.
# Remedy: look for the package in the list that loadPackage resolves with.
# Seen: "there: resolved, 1 packages, 0 messages", "404: resolved, 0 packages, 2 messages", "unknown:
#   rejected".
set -euo pipefail
command -v npm >/dev/null || { echo 'needs npm and Node.js'; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent pyodide@314.0.7 >/dev/null
tar xzf pyodide-314.0.7.tgz
python3 - <<'PYTHON'
import zipfile

info = "there-1.0.dist-info"
with zipfile.ZipFile("there-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("there.py", "value = 1\n")
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: there\nVersion: 1.0\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")
PYTHON
cat > look.mjs <<'NODE'
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { once } from "node:events";
import { loadPyodide } from "./package/pyodide.mjs";

const wheel = "/there-1.0-py3-none-any.whl";
const server = createServer((asked, answer) => {
  answer.writeHead(asked.url === wheel ? 200 : 404);
  answer.end(asked.url === wheel ? readFileSync(`.${wheel}`) : "");
}).listen(0, "127.0.0.1");
await once(server, "listening");
const at = `http://127.0.0.1:${server.address().port}`;
const python = await loadPyodide();
const cases = { there: at + wheel, 404: `${at}/gone-1.0-py3-none-any.whl`, unknown: "no-such-name" };
const seen = {};
for (const [name, what] of Object.entries(cases)) {
  const messages = [];
  const quiet = { messageCallback: () => {}, errorCallback: (text) => messages.push(text) };
  try {
    const loaded = await python.loadPackage(what, quiet);
    seen[name] = `resolved, ${loaded.length} packages, ${messages.length} messages`;
  } catch {
    seen[name] = "rejected";
  }
}
for (const [name, text] of Object.entries(seen)) console.log(`${name}: ${text}`);
const as_written = seen.there === "resolved, 1 packages, 0 messages"
  && seen[404].startsWith("resolved, 0 packages") && seen.unknown === "rejected";
process.exit(as_written ? 0 : 1);
NODE
node look.mjs
