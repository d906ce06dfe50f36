// A page in which modules fold and open: places.js says where everything lies, and this puts it there.
"use strict";

const plan = JSON.parse(document.getElementById("plan").textContent);
const { boxes, lengths } = plan;
const isOpen = new Set(plan.open);
const svg = document.querySelector("#picture svg");
const byId = (id) => document.getElementById(id);

// -- lines, as marks.py draws them

const number = (value) => value.toFixed(1);

function curve(points) {
  let path = `M${points[0].map(number)}`;
  for (let i = 1; i < points.length; i++) {
    const [[x, y], [x2, y2]] = [points[i - 1], points[i]];
    const half = (y + y2) / 2;
    if (Math.abs(x - x2) > 0.1) path += `C${[x, half, x2, half, x2, y2].map(number)}`;
    else if (Math.abs(y - y2) > 0.1) path += `V${number(y2)}`;
  }
  return path;
}

function bent([[x1, y1], [lane], , [x2, y2]]) {
  const bend = Math.min(lengths.BEND, Math.abs(y2 - y1) / 2);
  const out = lane < x1 ? -bend : bend;
  const up = y2 < y1 ? -bend : bend;
  return `M${[x1, y1]}H${lane - out}Q${[lane, y1, lane, y1 + up]}V${y2 - up}Q${[lane, y2, lane - out, y2]}H${x2}`;
}

function across([[x1, y], [x2]], free) {
  return free ? `M${[x1, y]}H${x2}` : `M${[x1, y]}h${lengths.STUB}M${[x2, y]}h${-lengths.STUB}`;
}

const mirrored = (points, axis) => points.map(([x, y]) => [2 * axis - x, y]).reverse();

// -- everything to its place

function show() {
  const places = place(plan, isOpen);
  const { closed, open, axis } = places;
  for (const part of svg.querySelectorAll("[data-part]")) part.setAttribute("display", "none");
  for (const [box, rect] of Object.entries(closed)) {
    move(`box-${box}`, rect.left, rect.top);
    move(`td-box-${box}`, 2 * axis - rect.right, rect.top);
  }
  for (const [box, rect] of Object.entries(open)) {
    frame(byId(`frame-${box}`), rect.left, rect);
    frame(byId(`td-frame-${box}`), 2 * axis - rect.right, rect);
    places.wires[box].forEach(({ points, endsAtBox, startsAtBox }, i) => {
      line(byId(`wire-${box}-${i}`), curve(points), endsAtBox);
      line(byId(`td-wire-${box}-${i}`), curve(mirrored(points, axis)), startsAtBox);
    });
  }
  places.arcs.forEach(({ points, numberAt }, i) => {
    line(byId(`arc-${i}`), bent(points), true);
    move(`number-${i}`, ...numberAt);
  });
  for (const [box, { points, free }] of Object.entries(places.laterals)) {
    line(byId(`lateral-${box}`), across(points, free), false);
  }
  for (const [kind, { rect, points }] of Object.entries(places.inlets)) {
    move(`inlet-${kind}`, rect.left, rect.top);
    line(byId(`way-${kind}`), points.length === 2 ? curve(points) : bent(points), true);
  }
  resize(places);
}

function move(id, x, y) {
  const part = byId(id);
  if (part) {
    part.setAttribute("transform", `translate(${x},${y})`);
    part.removeAttribute("display");
  }
}

function frame(part, x, rect) {
  if (part) {
    const [box, , parameters] = [part.querySelector("rect"), ...part.querySelectorAll("text")];
    box.setAttribute("width", rect.right - rect.left);
    box.setAttribute("height", rect.bottom - rect.top);
    if (parameters) parameters.setAttribute("x", rect.right - rect.left - lengths.PAD);
    move(part.id, x, rect.top);
  }
}

function line(part, path, arrow) {
  if (part) {
    part.setAttribute("d", path);
    part.setAttribute("marker-end", arrow ? `url(#${part.dataset.arrow})` : "none");
    part.removeAttribute("display");
  }
}

function resize({ open, closed, inlets, axis }) {
  const root = open[0] || closed[0];
  const left = -lengths.LANE * (1 + Math.max(-1, ...plan.arcs.map((arc) => arc.lane))) - lengths.MARGIN;
  const top = Math.min(0, ...Object.values(inlets).map(({ rect }) => rect.top)) - lengths.MARGIN;
  const right = plan.td ? 2 * axis + ("instruction" in inlets ? 2 * lengths.LANE : 0) : root.right;
  const [width, height] = [right - left, root.bottom + lengths.MARGIN - top];
  svg.setAttribute("viewBox", `${left} ${top} ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
}

// -- folding and opening

function toggle(box) {
  const seen = () => byId(isOpen.has(box) ? `frame-${box}` : `box-${box}`);
  const before = seen().getBoundingClientRect().top;
  if (!isOpen.delete(box)) isOpen.add(box);
  show();
  seen().focus({ preventScroll: true });
  window.scrollBy(0, seen().getBoundingClientRect().top - before); // what the reader opened stays where it was
}

function setOpen(which) {
  isOpen.clear();
  which.forEach((box) => isOpen.add(box));
  show();
}

const modules = boxes.map((box, i) => i).filter((i) => boxes[i].rows);
const states = { "as-first": plan.open, "open-all": modules, "fold-all": [0] };
for (const [button, which] of Object.entries(states)) {
  byId(button).hidden = modules.length === 1;
  byId(button).addEventListener("click", () => setOpen(which));
}

for (const part of svg.querySelectorAll("[data-box]")) {
  const box = Number(part.dataset.box);
  part.addEventListener("pointerenter", () => tell(box));
  part.addEventListener("focus", () => tell(box));
  if (boxes[box].rows) {
    part.addEventListener("click", () => toggle(box));
    part.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        toggle(box);
      }
    });
  }
}

// -- what is said of a box

function tell(box) {
  const list = byId("about");
  list.replaceChildren();
  for (const [term, lines] of boxes[box].about) {
    list.append(element("dt", term), ...lines.map((text) => element("dd", text)));
  }
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

// -- tasks

function countsOf(box) {
  const { active, inside } = boxes[box];
  if (active) return active;
  const all = inside.map(countsOf).filter(Boolean);
  if (!all.length) return null;
  const sum = (pick) => all.reduce((total, one) => total + pick(one), 0);
  const tasks = plan.tasks.map((_, i) => i);
  return { units: sum((one) => one.units), both: tasks.map((i) => tasks.map((j) => sum((one) => one.both[i][j]))) };
}

function chooseTasks() {
  const chosen = [...document.querySelectorAll("#tasks select")].map((select) => Number(select.value));
  const percent = (share) => `${Math.round(100 * share)} %`;
  const body = byId("shares");
  body.replaceChildren();
  boxes.forEach((box, i) => {
    const counts = box.site && countsOf(i);
    if (!counts) return;
    const shares = chosen.map((task) => counts.both[task][task] / counts.units);
    const [one, other = one] = chosen;
    const length = Math.sqrt(counts.both[one][one] * counts.both[other][other]);
    const overlap = (length ? counts.both[one][other] / length : 0).toFixed(2);
    const drawn = byId(`box-${i}`);
    if (!drawn) return; // the model as a whole
    shares.forEach((share, side) => {
      drawn.querySelector(`[data-share="${side}"]`).setAttribute("width", lengths.BAR * share);
      write(drawn.querySelector(`[data-percent="${side}"]`), percent(share));
    });
    if (chosen.length > 1) write(drawn.querySelector("[data-overlap]"), `overlap ${overlap}`);
    if (!box.rows) {
      const row = element("tr", "");
      row.append(element("th", box.name), ...shares.map((share) => element("td", percent(share))));
      if (chosen.length > 1) row.append(element("td", overlap));
      body.append(row);
    }
  });
  document.querySelectorAll("[data-task]").forEach((head) => {
    head.textContent = plan.tasks[chosen[Number(head.dataset.task)]];
  });
}

function write(text, content) {
  text.textContent = content;
  text.removeAttribute("textLength");
}

if (plan.tasks.length) {
  document.querySelectorAll("#tasks select").forEach((select) => select.addEventListener("change", chooseTasks));
  chooseTasks();
}
show();
tell(0);
