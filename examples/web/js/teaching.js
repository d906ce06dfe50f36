// The network that learns: give it labelled examples, and see how it does on others.

import { batch, compose, paint, SIDE } from "./digits.js";
import { drawCurve } from "./curve.js";
import { byId, element, grey, newest, percent } from "./elements.js";
import { TASKS } from "./instruction.js";
import { Learner } from "./learner.js";
import { probabilities, winner } from "./networks.js";
import { missing, tenDigits } from "./pair.js";

const [LEFT, RIGHT] = [0, 1];
const STOCKS = [1000, 300, 100, 0]; // examples that the reader can choose
const BATCH = 32; // examples in a step
const RATE = 0.001; // of learning
const REHEARSAL = 0.5; // share of a batch that is told to read the left digit
const EVERY = 10; // steps from test to test
const LESSON = 100; // steps: then it pauses by itself
const TESTED = 50; // test pairs at once
const SHOWN = 8; // examples

/**
 * Set up the demonstration.
 * @param {string} folder - with the learner
 * @param {import("./digits.js").Digit[]} lesson - digits to teach with
 * @param {import("./digits.js").Digit[][]} tests - pairs to test with
 * @param {() => import("./digits.js").Digit[]} pair - the two digits at present
 * @returns {Promise<() => void>} takes note that there is another pair
 */
export async function teaching(folder, lesson, tests, pair) {
  const lessons = new Lessons(await Learner.open(folder), lesson, tests, pair);
  await lessons.test();
  return () => lessons.pairChanged();
}

/** The examples, the learner, and what it has reached. */
class Lessons {
  constructor(learner, lesson, tests, pair) {
    Object.assign(this, { learner, lesson, tests, pair });
    this.own = []; // examples of the reader's
    this.points = []; // of the curve
    this.teaching = false; // whether the reader wants it
    this.learning = false; // whether it still does
    this.readPair = newest(() => this.read());
    this.begin();
    byId("stock").append(
      ...STOCKS.map((n) => element("option", { value: n }, n ? `${n} from the page` : "only my own")),
    );
    byId("own-label").append(...tenDigits().map(([label]) => element("option", { value: label }, label)));
    byId("test-size").textContent = tests.length;
    byId("stock").addEventListener("change", () => this.gather());
    byId("add").addEventListener("click", () => this.addOwn());
    byId("reset").addEventListener("click", () => this.startOver());
    byId("teach-button").addEventListener("click", () => this.want(!this.teaching));
    this.gather();
  }

  // -- examples -----------------------------------------------------------------------------------------------------

  /** The examples: the reader's own, and as many of the page's as were chosen, the same each time. */
  gather() {
    const random = randomNumbers(1);
    const any = () => this.lesson[Math.floor(random() * this.lesson.length)];
    const stock = Array.from({ length: Number(byId("stock").value) }, () => example(any(), any()));
    this.examples = [...this.own, ...stock];
    byId("examples").replaceChildren(...this.examples.slice(0, SHOWN).map(picture));
    grey(byId("teach-button"), this.examples.length ? "" : "There is no example yet: add one, or take the page's.");
    if (!this.examples.length) this.want(false);
  }

  /** The present pair becomes an example, with the label that the reader gives its right digit. */
  addOwn() {
    const [left, right] = this.pair();
    this.own.unshift(example(left, { ...right, label: Number(byId("own-label").value) }));
    this.gather();
  }

  /** Images, labels and tasks of one step. */
  nextBatch() {
    const rehearsal = byId("rehearse").checked ? REHEARSAL : 0;
    const chosen = Array.from({ length: BATCH }, () => {
      const one = this.examples[Math.floor(this.random() * this.examples.length)];
      const rehearsed = this.random() < rehearsal && one.labels[LEFT] !== null;
      return { ...one, task: rehearsed ? LEFT : RIGHT };
    });
    return [
      batch(chosen.map(({ image }) => image)),
      chosen.map(({ labels, task }) => labels[task]),
      chosen.map(({ task }) => task),
    ];
  }

  // -- learning -----------------------------------------------------------------------------------------------------

  /** As the network came. */
  begin() {
    this.learner.reset();
    this.random = randomNumbers(2);
    this.steps = 0;
  }

  /** Forget everything that was learned here. */
  startOver() {
    this.begin();
    this.points.length = 1;
    this.show();
  }

  /** The reader wants the network to learn, or to pause. */
  want(teaching) {
    this.teaching = teaching;
    this.end = this.steps + LESSON;
    byId("teach-button").textContent = teaching ? "Pause" : "Teach";
    if (teaching && !this.learning) this.learn();
  }

  /** Learn until the lesson is over or the reader says stop; test every few steps, and at the end. */
  async learn() {
    this.learning = true;
    grey(byId("reset"), "Pause it before you start over.");
    while (this.teaching) {
      await this.learner.step(...this.nextBatch(), RATE);
      this.steps++;
      if (this.steps === this.end) this.want(false);
      if (this.steps % EVERY === 0 || !this.teaching) await this.test();
    }
    this.learning = false;
    grey(byId("reset"), "");
  }

  /** See how the network does on the test pairs. */
  async test() {
    const shares = [];
    for (const task of [LEFT, RIGHT]) shares.push(await this.accuracy(task));
    this.points.push({ steps: this.steps, shares });
    this.show();
  }

  /** The share of the test pairs that the network reads correctly. */
  async accuracy(task) {
    let correct = 0;
    for (let start = 0; start < this.tests.length; start += TESTED) {
      const some = this.tests.slice(start, start + TESTED);
      const logits = await this.learner.predict(batch(some.map((pair) => compose(...pair))), task);
      correct += probabilities(logits).filter((shares, i) => winner(shares) === some[i][task].label).length;
    }
    return correct / this.tests.length;
  }

  // -- what the page shows ------------------------------------------------------------------------------------------

  show() {
    const { steps, shares } = this.points.at(-1);
    drawCurve(byId("curve"), byId("curve-table"), TASKS, this.points);
    byId("teach-says").textContent =
      `After ${steps} steps it reads ${percent(shares[RIGHT])} of right and ${percent(shares[LEFT])} of left digits correctly.`;
    this.readPair();
  }

  /** There is another pair: suggest its label, and read it. */
  pairChanged() {
    const { label } = this.pair()[RIGHT];
    if (label !== null) byId("own-label").value = label;
    this.readPair();
  }

  /** Read the present pair; `readPair` always shows the newest. */
  async read() {
    const absent = missing(this.pair());
    grey(byId("add"), absent);
    if (absent) {
      byId("own-says").textContent = absent;
      return;
    }
    const logits = await this.learner.predict(batch([compose(...this.pair())]), RIGHT);
    const [shares] = probabilities(logits);
    byId("own-says").textContent =
      `Told to read the right-hand one of your two digits, it now says ${winner(shares)} (${percent(Math.max(...shares))}).`;
  }
}

function example(left, right) {
  return { image: compose(left, right), labels: [left.label, right.label] };
}

/** An example as a list item: its image, and its label. */
function picture({ image, labels }) {
  const canvas = element("canvas", { width: SIDE, height: SIDE, attributes: { "aria-hidden": "true" } });
  paint(canvas, image);
  return element("li", {}, canvas, element("span", {}, String(labels[RIGHT])));
}

/**
 * Random numbers in 0..1, always the same ones, so that a lesson can be repeated.
 * @param {number} seed
 * @returns {() => number}
 */
function randomNumbers(seed) {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0; // a linear congruential generator
    return state / 2 ** 32;
  };
}
