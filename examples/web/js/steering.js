// The network with feedback: tell it what to look for.

import { batch, overlay, paint } from "./digits.js";
import { byId, choices, grey, newest, percent } from "./elements.js";
import { floats, open, probabilities, winner } from "./networks.js";
import { missing, tenDigits } from "./pair.js";
import { Predictions } from "./predictions.js";
import { readWords } from "./words.js";

const NOTHING = "nothing";

/**
 * Set up the demonstration.
 * @param {string} folder - with the network
 * @param {object} about - what page.json says of it
 * @param {object} prior - words.json
 * @param {object} measured - how often it is right
 * @param {() => import("./digits.js").Digit[]} pair - the two digits at present
 * @returns {Promise<() => Promise<void>>} shows what the network makes of the present pair
 */
export async function steering(folder, about, prior, measured, pair) {
  const network = await open(`${folder}/steering.onnx`);
  const table = new Predictions(byId("passes"), "How sure each pass is", ["pass 1", "pass 2"]);
  const [says, strength, words] = [byId("steer-says"), byId("strength"), byId("words")];
  const show = newest(run);
  const target = choices(byId("target"), "target", new Map([[NOTHING, NOTHING], ...tenDigits()]), show);
  target.value = NOTHING;
  strength.value = about.strength;
  strength.addEventListener("input", show);
  words.addEventListener("input", show);
  byId("steer-measured").textContent =
    `Asked for one digit of a test pair, and then for the other, with a strength of ${about.strength}, pass 2 names the ` +
    `one asked for ${percent(measured.steered)} of the time. Unsteered it is ${percent(measured.unsteered)}, ` +
    "and cannot be more than half.";

  async function run() {
    const image = overlay(...pair());
    paint(byId("overlaid"), image);
    byId("strength-value").textContent = Number(strength.value).toFixed(1);
    const { activation, name } = wanted();
    grey(strength, activation ? "" : "Works once there is something to look for.");
    grey(byId("target"), words.value.trim() ? "Your words go before a choice: delete them to choose." : "");
    const absent = missing(pair());
    if (absent) {
      table.clear();
      says.textContent = absent;
      return;
    }
    const passes = await passesOver(image, activation);
    table.show(
      passes,
      pair().map((digit) => digit.label),
    );
    const [first, second] = passes.map((shares) => `a ${winner(shares)} (${percent(Math.max(...shares))})`);
    const looking = activation ? `, looking for ${name},` : name;
    says.textContent = `Pass 1 sees ${first}. Pass 2${looking} sees ${second}.`;
  }

  /** What to steer with, if anything, and what it is called: words go before a choice. */
  function wanted() {
    const text = words.value.trim();
    if (text) {
      const { activation, known } = readWords(text, prior);
      return known ? { activation, name: `“${text}”` } : { activation: null, name: ", which knows none of these letters," };
    }
    if (target.value === NOTHING) return { activation: null, name: "" };
    return { activation: about.prototypes[Number(target.value)], name: `a ${target.value}` };
  }

  /** The probabilities of each pass; an alpha of 0 leaves the feedback as it is. */
  async function passesOver(image, activation) {
    const { data, dims } = batch([image]);
    const results = await network.run({
      input: floats(data, dims),
      [`${about.source}.activation`]: floats(activation ?? about.prototypes[0], [1, 10]),
      [`${about.source}.alpha`]: floats([activation ? 1 : 0], []),
      [`${about.source}.strength`]: floats(Array(2).fill(activation ? strength.value : 1), [2]),
    });
    return [results.output_1, results.output_2].map((logits) => probabilities(logits)[0]);
  }

  return show;
}
