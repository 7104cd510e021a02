// Python of this page: Pyodide and the planner's files, asked one thing at a time.

import { loadPyodide } from "./pyodide/pyodide.mjs";

const START = `
import sys
sys.path.insert(0, "/planner")
from rlhf_lab.planning import plan
from planner_page import Page
Page(plan)
`;

async function start() {
  const files = fetch("planner.zip").then((answer) => {
    if (!answer.ok) throw new Error(`planner.zip: ${answer.status}`);
    return answer.arrayBuffer();
  });
  const [python, archive] = await Promise.all([loadPyodide(), files]);
  python.unpackArchive(archive, "zip", { extractDir: "/planner" });
  return python.runPython(START);
}

const page = start();
page.then(() => postMessage({ ready: true }), (error) => postMessage({ failed: String(error) }));

onmessage = async ({ data: { id, ask, values } }) => {
  try {
    postMessage({ id, answer: (await page)[ask](...values) });
  } catch (error) {
    postMessage({ id, error: String(error.message ?? error).trim().split("\n").pop() });
  }
};
