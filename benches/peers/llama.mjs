// Times decode steps and the reading of a prompt in examples/language_model beside llama.cpp: the
// same GGUF file, the same tokens, one thread, steps of all contestants interleaved.
//
// llama.cpp is what comes prebuilt with the npm package node-llama-cpp, which is looked for in the
// folder that --packages names. The table replaces the section between the markers of
// docs/models.md; with --dry-run it is only printed.

import { spawn, spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
const PAGE = path.join(ROOT, "docs/models.md");
const [BEGIN, END] = ["<!-- llama:begin -->", "<!-- llama:end -->"];

const { values: options, positionals: given } = parseArgs({
  allowPositionals: true,
  options: {
    model: { type: "string", default: process.env.DIJIANG_MODEL },
    packages: { type: "string", default: "." },
    lengths: { type: "string", default: "512,8000" },
    rounds: { type: "string", default: "12" }, // of STEPS steps at each length
    "dry-run": { type: "boolean", default: false },
  },
});
const kernels = given.length ? given : ["softmax", "merged:64,pool"];
const lengths = options.lengths.split(",").map(Number);
const rounds = Number(options.rounds);
const STEPS = 4; // of a contestant before the next one's turn
const BATCH = 512; // tokens read at once, by all

const median = (list) => {
  const sorted = [...list].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

/** This crate's example with a kernel, in a process that is told what to do. */
class Ours {
  constructor(program, kernel) {
    this.name = `\`${kernel}\``;
    this.kernel = kernel;
    const env = { ...process.env, RAYON_NUM_THREADS: "1" };
    const pipes = { stdio: ["pipe", "pipe", "inherit"], env };
    this.process = spawn(program, [options.model, "quantised"], pipes);
    this.lines = createInterface({ input: this.process.stdout })[Symbol.asyncIterator]();
  }

  async ask(line) {
    this.process.stdin.write(`${line}\n`);
    const { value, done } = await this.lines.next();
    if (done) throw new Error(`the example ended at \`${line}\``);
    return JSON.parse(value);
  }

  start = () => this.ask(`kernel ${this.kernel}`);
  read = (count) => this.ask(`read ${count}`);

  async step(count) {
    const { seconds, next } = await this.ask(`step ${count}`);
    return { seconds: seconds.map(([all]) => all), next };
  }

  end = () => this.process.stdin.end();
}

/** llama.cpp, with its attention of before or with flash attention. */
class Llama {
  constructor(model, tokens, flashAttention) {
    this.name = flashAttention ? "llama.cpp, flash attention" : "llama.cpp";
    Object.assign(this, { model, tokens, flashAttention, position: 0 });
  }

  async start() {
    const contextSize = this.tokens.length + BATCH;
    const { flashAttention } = this;
    this.context = await this.model.createContext({
      contextSize,
      threads: 1,
      batchSize: BATCH,
      flashAttention,
    });
    this.sequence = this.context.getSequence();
  }

  next = (count) => this.tokens.slice(this.position, (this.position += count));

  async read(count) {
    const tokens = this.next(count);
    const start = performance.now();
    await this.sequence.evaluateWithoutGeneratingNewTokens(tokens);
    return (performance.now() - start) / 1e3;
  }

  async step(count) {
    const found = { seconds: [], next: [] };
    for (const token of this.next(count)) {
      const start = performance.now();
      const wanted = { generateNext: { token: true, options: { temperature: 0 } } };
      const [{ next }] = await this.sequence.controlledEvaluate([[token, wanted]]);
      found.seconds.push((performance.now() - start) / 1e3);
      found.next.push(next.token);
    }
    return found;
  }

  end = () => this.context.dispose();
}

/** Builds the bench of the example; its path. */
function build() {
  const args = ["bench", "-p", "language_model", "--bench", "steps", "--no-run"];
  const made = spawnSync("cargo", [...args, "--message-format=json"], {
    cwd: ROOT,
    encoding: "utf8",
    maxBuffer: 1 << 28,
    stdio: ["ignore", "pipe", "inherit"],
  });
  if (made.status !== 0) throw new Error("cargo could not build the bench `steps`");
  const lines = made.stdout.split("\n").filter((line) => line.startsWith("{"));
  const found = lines.map((line) => JSON.parse(line)).filter((m) => m.target?.name === "steps");
  return found.find((message) => message.executable).executable;
}

/** The package of llama.cpp. */
async function packaged() {
  const require = createRequire(path.resolve(options.packages, "any.js"));
  const entry = require.resolve("node-llama-cpp");
  const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
  const { version } = JSON.parse(
    readFileSync(path.resolve(options.packages, "node_modules/node-llama-cpp/package.json")),
  );
  const quiet = { build: "never", logLevel: LlamaLogLevel.error, progressLogs: false };
  const llama = await getLlama({ gpu: false, maxThreads: 1, ...quiet });
  return { llama, version };
}

const program = build();
const { llama, version } = await packaged();
const model = await llama.loadModel({ modelPath: options.model, gpuLayers: 0 });
const ours = kernels.map((kernel) => new Ours(program, kernel));
const text = await ours[0].ask(`tokens ${lengths.at(-1) + 2 * STEPS * rounds}`);
const contestants = [new Llama(model, text, false), new Llama(model, text, true), ...ours];
for (const one of contestants) {
  await one.start();
  Object.assign(one, { seconds: 0, steps: lengths.map(() => []), said: [] });
}

let [position, read] = [0, 0];
for (const [i, length] of lengths.entries()) {
  // chunk by chunk in turns, so that a slow spell of the machine meets all
  for (; position < length; position += BATCH) {
    const count = Math.min(BATCH, length - position);
    for (const one of contestants) one.seconds += await one.read(count);
    read += count;
  }
  position = length;
  for (let round = 0; round < rounds; round++) {
    for (const one of contestants) {
      const { seconds, next } = await one.step(STEPS);
      one.steps[i].push(...seconds);
      one.said.push(...next);
    }
  }
  position += rounds * STEPS;
  console.error(`${length} tokens done`);
}
contestants.forEach((one) => one.end());

// the faster llama.cpp counts, at each length and in reading
const peers = contestants.filter((one) => one instanceof Llama);
const ms = (one, i) => 1e3 * median(one.steps[i]);
const best = lengths.map((_, i) => Math.min(...peers.map((one) => ms(one, i))));
const rate = (one) => read / one.seconds;
const fastest = Math.max(...peers.map(rate));
const agreement = (one) => {
  const same = one.said.filter((token, i) => token === contestants[0].said[i]).length;
  return `${((100 * same) / one.said.length).toFixed(0)} %`;
};
const count = (n) => String(n).replace(/\B(?=(\d{3})$)/, " ");
const times = (x) => `${x.toFixed(x < 10 ? 2 : 1)}×`;
const rows = contestants.map((one) => [
  one.name,
  ...lengths.flatMap((_, i) => [ms(one, i).toFixed(1), times(best[i] / ms(one, i))]),
  rate(one).toFixed(0),
  times(rate(one) / fastest),
  agreement(one),
]);
const header = [
  "one thread",
  ...lengths.flatMap((length) => [`step at ${count(length)}, ms`, "faster"]),
  `reading ${count(lengths.at(-1))}, tokens/s`,
  "faster",
  "same next token",
];
const lines = [header, header.map((_, i) => (i ? "---:" : "---")), ...rows];
const table = lines.map((cells) => `| ${cells.join(" | ")} |`).join("\n");
const command = ["node benches/peers/llama.mjs", ...process.argv.slice(2).filter(shown)].join(" ");
function shown(argument, i, all) {
  const before = all[i - 1];
  return !["--model", "--packages", "--dry-run"].includes(argument)
    && !["--model", "--packages"].includes(before)
    && !/^--(model|packages)=/.test(argument);
}
const source = [
  `*\`${command}\`, ${path.basename(options.model)}, node-llama-cpp ${version} (llama.cpp`,
  `${llama.llamaCppRelease.release}),`,
  `${new Date().toISOString().slice(0, 10)}, one core of ${os.cpus()[0].model.trim()}; medians of`,
  `${rounds * STEPS} steps.*`,
].join(" ");
const section = `${table}\n\n${source}`;
console.log(section);
if (!options["dry-run"]) {
  const page = readFileSync(PAGE, "utf8");
  const [from, to] = [page.indexOf(BEGIN), page.indexOf(END)];
  if (from < 0 || to < from) throw new Error(`${PAGE} has no section for the table`);
  const wrapped = wrap(section);
  writeFileSync(PAGE, `${page.slice(0, from)}${BEGIN}\n${wrapped}\n${page.slice(to)}`);
}
await llama.dispose();

/** Breaks the prose after the table at 100 columns. */
function wrap(section) {
  const [table, prose] = section.split("\n\n");
  const lines = [""];
  for (const word of prose.split(" ")) {
    const last = lines.at(-1);
    if (last && last.length + 1 + word.length > 100) lines.push(word);
    else lines[lines.length - 1] = last ? `${last} ${word}` : word;
  }
  return `${table}\n\n${lines.join("\n")}`;
}
