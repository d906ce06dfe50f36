// The page: load everything, and let the three demonstrations follow the two digits.

import { fetched, readDigits } from "./digits.js";
import { byId } from "./elements.js";
import { instruction } from "./instruction.js";
import { Slot } from "./pair.js";
import { steering } from "./steering.js";
import { teaching } from "./teaching.js";

const DATA = "data";

async function main() {
  const [about, words, tests, lesson] = await Promise.all([
    fetched(`${DATA}/page.json`).then((answer) => answer.json()),
    fetched(`${DATA}/words.json`).then((answer) => answer.json()),
    readDigits(`${DATA}/test_digits.bin`),
    readDigits(`${DATA}/lesson_digits.bin`),
  ]);
  let followers = [];
  const changed = () => followers.forEach((follower) => follower());
  const slots = ["Left", "Right"].map(
    (side, i) => new Slot(byId(side.toLowerCase()), `${side} digit`, tests, about.pair[i], changed),
  );
  const pair = () => slots.map((slot) => slot.digit);
  const half = tests.length / 2;
  const pairs = tests.slice(0, half).map((digit, i) => [digit, tests[half + i]]);

  followers = await Promise.all([
    steering(DATA, about.steering, words, about.measured.steering, pair),
    instruction(DATA, about.instructed, about.measured.instructed, pair),
    teaching(DATA, lesson, pairs, pair),
  ]);
  changed();
  byId("status").hidden = true;
  byId("page").hidden = false;
}

/** Say what went wrong, where it can be seen. */
function failed(error) {
  const status = byId("status");
  status.className = "trouble";
  status.hidden = false;
  status.textContent = `Something went wrong: ${error.message}`;
}

window.addEventListener("unhandledrejection", (event) => failed(event.reason));
main();
