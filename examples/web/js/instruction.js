// The instructed network: tell it which digit to read.

import { batch, compose, paint } from "./digits.js";
import { byId, choices, newest, percent } from "./elements.js";
import { floats, open, probabilities, winner } from "./networks.js";
import { missing } from "./pair.js";
import { Predictions } from "./predictions.js";
import { unitsOf } from "./units.js";

export const TASKS = ["left", "right"];

/**
 * Set up the demonstration.
 * @param {string} folder - with the network
 * @param {object} about - what page.json says of it
 * @param {object} measured - how often it is right
 * @param {() => import("./digits.js").Digit[]} pair - the two digits at present
 * @returns {Promise<() => Promise<void>>} shows what the network makes of the present pair
 */
export async function instruction(folder, about, measured, pair) {
  const network = await open(`${folder}/instructed.onnx`);
  const table = new Predictions(byId("reading"), "How sure it is", ["it reads"]);
  const says = byId("instruct-says");
  const sites = about.sites.map((site) => unitsOf(site, TASKS));
  byId("sites").append(...sites.map((site) => site.figure));
  const show = newest(run);
  const task = choices(byId("task"), "task", new Map(TASKS.map((name) => [name, name])), show);
  task.value = TASKS[0];
  byId("instruct-measured").textContent =
    "In its test pairs it reads " +
    TASKS.map((name) => `${percent(measured[name], 1)} of the digits on the ${name}`).join(" and ") +
    " correctly.";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

  async function run() {
    const image = compose(...pair());
    paint(byId("composed"), image);
    const told = TASKS.indexOf(task.value);
    for (const site of sites) site.show(told);
    const absent = missing(pair());
    if (absent) {
      table.clear();
      says.textContent = absent;
      return;
    }
    const { data, dims } = batch([image]);
    const instruction = TASKS.map((_, i) => Number(i === told));
    const results = await network.run({
      input: floats(data, dims),
      instruction: floats(instruction, [1, TASKS.length]),
    });
    const [shares] = probabilities(results.output);
    table.show(
      [shares],
      pair().map((digit) => digit.label),
    );
    says.textContent = `Told to read on the ${TASKS[told]}, it reads a ${winner(shares)} (${percent(Math.max(...shares))}).`;
  }

  return show;
}
