// The network with feedback: tell it what to look for.

import { batch, overlay, paint } from "./digits.js";
import { byId, choices, newest, percent } from "./elements.js";
import { floats, open, probabilities, winner } from "./networks.js";
import { tenDigits } from "./pair.js";
import { Predictions } from "./predictions.js";

const NOTHING = "nothing";

/**
 * Set up the demonstration.
 * @param {string} folder - with the network
 * @param {object} about - what page.json says of it
 * @param {object} measured - how often it is right
 * @param {() => import("./digits.js").Digit[]} pair - the two digits at present
 * @returns {Promise<() => Promise<void>>} shows what the network makes of the present pair
 */
export async function steering(folder, about, measured, pair) {
  const network = await open(`${folder}/steering.onnx`);
  const table = new Predictions(byId("passes"), "How sure each pass is", ["pass 1", "pass 2"]);
  const [says, strength] = [byId("steer-says"), byId("strength")];
  const show = newest(run);
  const target = choices(byId("target"), "target", new Map([[NOTHING, NOTHING], ...tenDigits()]), show);
  target.value = NOTHING;
  strength.value = about.strength;
  strength.addEventListener("input", show);
  byId("steer-measured").textContent =
    `Asked for one digit of a test pair, and then for the other, with a strength of ${about.strength}, pass 2 names the ` +
    `one asked for ${percent(measured.steered)} of the time. Unsteered it is ${percent(measured.unsteered)}, ` +
    "and cannot be more than half.";

  async function run() {
    const image = overlay(...pair());
    paint(byId("overlaid"), image);
    byId("strength-value").textContent = Number(strength.value).toFixed(1);
    const wanted = target.value === NOTHING ? null : Number(target.value);
    strength.disabled = wanted === null;
    const passes = await passesOver(image, wanted);
    table.show(
      passes,
      pair().map((digit) => digit.label),
    );
    const [first, second] = passes.map((shares) => `a ${winner(shares)} (${percent(Math.max(...shares))})`);
    const looking = wanted === null ? "" : `, looking for a ${wanted},`;
    says.textContent = `Pass 1 sees ${first}. Pass 2${looking} sees ${second}.`;
  }

  /** The probabilities of each pass; an alpha of 0 leaves the feedback as it is. */
  async function passesOver(image, wanted) {
    const { data, dims } = batch([image]);
    const results = await network.run({
      input: floats(data, dims),
      [`${about.source}.activation`]: floats(about.prototypes[wanted ?? 0], [1, 10]),
      [`${about.source}.alpha`]: floats([wanted === null ? 0 : 1], []),
      [`${about.source}.strength`]: floats(Array(2).fill(wanted === null ? 1 : strength.value), [2]),
    });
    return [results.output_1, results.output_2].map((logits) => probabilities(logits)[0]);
  }

  return show;
}
