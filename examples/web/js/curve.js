// The accuracies over the steps of learning, as a picture and as a table.

import { element, percent } from "./elements.js";

/** @typedef {{steps: number, shares: number[]}} Point - the share read correctly, by task */

const SVG = "http://www.w3.org/2000/svg";
const PLOT = { left: 60, right: 302, top: 12, bottom: 192 }; // in the units of the picture's viewBox
const AXIS = 100; // steps: the axis is as long, or several times as long

/**
 * Draw the curves.
 * @param {SVGElement} picture
 * @param {HTMLElement} table - is filled
 * @param {string[]} tasks
 * @param {Point[]} points - in the order of their steps; at least one
 */
export function drawCurve(picture, table, tasks, points) {
  const last = points.at(-1);
  const end = AXIS * Math.max(1, Math.ceil(last.steps / AXIS));
  const x = (steps) => PLOT.left + ((PLOT.right - PLOT.left) * steps) / end;
  const y = (share) => PLOT.bottom - (PLOT.bottom - PLOT.top) * share;
  const places = (task) => points.map(({ steps, shares }) => [x(steps), y(shares[task])]);
  const names = labels(tasks, last.shares.map(y));
  picture.replaceChildren(
    ...[0, 0.25, 0.5, 0.75, 1].flatMap((share) => grid(y(share), percent(share))),
    tick(x(0), "0"),
    tick(x(end / 2), String(end / 2)),
    tick(x(end), `${end} steps`),
    ...tasks.flatMap((task, i) => line(task, places(i))),
    ...names.map(([task, at]) => text(task, { class: task, x: x(last.steps) + 12, y: at + 5 })),
  );
  const read = tasks.map((task, i) => `${task} digits ${percent(last.shares[i])}`).join(", ");
  picture.setAttribute("aria-label", `Accuracy on the test pairs after ${last.steps} steps: ${read}`);
  table.replaceChildren(asTable(tasks, points));
}

/** A line across, and its name on the left. */
function grid(y, name) {
  const across = shape("line", { class: "grid", x1: PLOT.left, x2: PLOT.right, y1: y, y2: y });
  return [across, text(name, { x: PLOT.left - 8, y: y + 5, "text-anchor": "end" })];
}

function tick(x, name) {
  return text(name, { x, y: PLOT.bottom + 20, "text-anchor": "middle" });
}

/** A line, and a mark of its own at every point: a disc on the left, a square on the right. */
function line(task, places) {
  const marks = places.map(([x, y]) =>
    task === "left"
      ? shape("circle", { class: task, cx: x, cy: y, r: 4 })
      : shape("rect", { class: task, x: x - 4, y: y - 4, width: 8, height: 8 }),
  );
  return [shape("polyline", { class: task, points: places.map((place) => place.join(",")).join(" ") }), ...marks];
}

/** Where each line's name stands: at its end, but no name over another. */
function labels(tasks, ends) {
  const gap = Math.max(0, 18 - Math.abs(ends[0] - ends[1])) / 2;
  const upper = ends[0] <= ends[1] ? 0 : 1;
  return tasks.map((task, i) => [task, ends[i] + (i === upper ? -gap : gap)]);
}

function asTable(tasks, points) {
  const head = ["steps", ...tasks].map((name) => element("th", { scope: "col" }, name));
  const rows = points.map(({ steps, shares }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, String(steps)),
      ...shares.map((share) => element("td", {}, percent(share, 1))),
    ),
  );
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

function text(words, attributes) {
  const made = shape("text", attributes);
  made.textContent = words;
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
