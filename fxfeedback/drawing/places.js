// Where boxes, wires and arcs lie, for a given set of open boxes: in the page what places.py is for pictures. Change both
// together; a test holds them equal. `plan` is what page.py makes of a Plan: boxes by their number, outer before inner,
// and the lengths of lengths.py.
"use strict";

function place(plan, isOpen) {
  const { boxes, lengths: L } = plan;
  const closed = {}, open = {};
  const sizes = [], columns = [], heights = [];

  // -- sizes, from the inside out

  function measure(box) {
    sizes[box] = isOpen.has(box) ? measureOpen(box) : [L.WIDTH, boxes[box].site ? L.SITE_HEIGHT : L.HEIGHT];
    return sizes[box];
  }

  function measureOpen(box) {
    const { items, enter, leave } = boxes[box].rows;
    const inside = items.map((item, i) =>
      item.box !== null ? measure(item.box) : [i === enter || i === leave ? L.PORT : L.PASSAGE, 0]);
    columns[box] = spread(items, inside.map(([width]) => width));
    heights[box] = new Array(1 + Math.max(...items.map((item) => item.row))).fill(0);
    items.forEach(({ row }, i) => (heights[box][row] = Math.max(heights[box][row], inside[i][1])));
    const right = Math.max(...items.map((item, i) => columns[box][item.column] + inside[i][0] / 2));
    const [above, below] = margins(box);
    const total = heights[box].reduce((sum, height) => sum + height, 0);
    return [right + L.MARGIN, above + total + L.GAP_Y * (heights[box].length - 1) + below];
  }

  function margins(box) {
    const { enter, leave } = boxes[box].rows;
    return box === 0 ? [0, 0] : [L.TITLE + (leave === null ? L.GAP_Y : 0), enter === null ? L.GAP_Y : 0];
  }

  function spread(items, widths) {
    const x = [];
    for (let column = 0; column <= Math.max(...items.map((item) => item.column)); column++) {
      const least = [column ? x[column - 1] : 0];
      items.forEach((item, i) => {
        if (item.column === column) {
          const { left } = item;
          const edge = left === null ? L.MARGIN : x[items[left].column] + widths[left] / 2 + L.GAP_X;
          least.push(edge + widths[i] / 2);
        }
      });
      x.push(Math.max(...least));
    }
    return x;
  }

  // -- places, from the outside in

  function put(box, left, top) {
    const [width, height] = sizes[box];
    const rect = { left, top, right: left + width, bottom: top + height };
    if (!isOpen.has(box)) {
      closed[box] = rect;
      return;
    }
    open[box] = rect;
    const edges = rowEdges(box);
    for (const item of boxes[box].rows.items) {
      if (item.box !== null) {
        const [width, height] = sizes[item.box];
        const [above, below] = edges[item.row];
        put(item.box, xOf(box, item) - width / 2, (above + below) / 2 - height / 2);
      }
    }
  }

  function rowEdges(box) {
    let y = open[box].bottom - margins(box)[1];
    return heights[box].map((height) => {
      const edges = [y - height, y];
      y -= height + L.GAP_Y;
      return edges;
    });
  }

  const xOf = (box, item) => open[box].left + columns[box][item.column];
  const rectOf = (box) => closed[box] || open[box];
  const middle = (rect) => (rect.top + rect.bottom) / 2;

  // -- wires

  function wires(box) {
    const { items, wires } = boxes[box].rows;
    const edges = rowEdges(box);
    return wires.map((along) => {
      const [first, ...passed] = along.map((index) => items[index]);
      const last = passed.pop();
      const points = leaving(box, first, passed.length ? passed[0] : last, edges);
      for (const item of passed) {
        const [above, below] = edges[item.row];
        points.push([xOf(box, item), below], [xOf(box, item), above]);
      }
      points.push(...arriving(box, last, points[points.length - 1][0], edges));
      return { points, startsAtBox: first.box in closed, endsAtBox: last.box in closed };
    });
  }

  function leaving(box, first, following, edges) {
    const [above, below] = edges[first.row];
    if (first.box === null) return [[xOf(box, first), below], [xOf(box, first), above]];
    let towards = xOf(box, following);
    if (following.box in open) towards = attach(following.box, towards, false);
    const x = attach(first.box, towards, true);
    return [[x, rectOf(first.box).top], [x, above]];
  }

  function arriving(box, last, from, edges) {
    const [above, below] = edges[last.row];
    if (last.box === null) return [below, above, open[box].top].map((y) => [xOf(box, last), y]);
    const x = attach(last.box, from, false);
    return [[x, below], [x, rectOf(last.box).bottom]];
  }

  function attach(box, x, leave) {
    const rect = rectOf(box);
    if (box in closed) return Math.min(Math.max(x, rect.left + L.INSET), rect.right - L.INSET);
    const { rows } = boxes[box];
    return xOf(box, rows.items[leave ? rows.leave : rows.enter]);
  }

  // -- other ways

  function shown(node) {
    let found = node;
    for (let { around } = boxes[node]; around !== null; { around } = boxes[around]) {
      if (!isOpen.has(around)) found = around;
    }
    return found;
  }

  function arcs() {
    const pairs = plan.arcs.map(({ source, destination }) => [shown(source), shown(destination)]);
    const ends = {};
    pairs.forEach((pair, i) => pair.forEach((box, side) => (ends[box] = ends[box] || []).push(2 * i + side)));
    const end = (i, side) => {
      const box = pairs[i][side], own = ends[box];
      return [closed[box].left, middle(closed[box]) + L.SPREAD * (own.indexOf(2 * i + side) - (own.length - 1) / 2)];
    };
    const ways = plan.arcs.map(({ lane }, i) => {
      const x = -L.LANE * (lane + 1), start = end(i, 0), stop = end(i, 1);
      return { points: [start, [x, start[1]], [x, stop[1]], stop] };
    });
    const crossings = ways.flatMap(({ points }) => [points[0][1], points[3][1]]);
    for (const way of ways) {
      const [, [x, y1], [, y2]] = way.points;
      const candidates = L.NUMBER_AT.map((part) => y1 + (y2 - y1) * part);
      const free = candidates.filter((y) => crossings.every((other) => Math.abs(y - other) > L.DISC));
      way.numberAt = [x, [...free, candidates[0]][0]];
    }
    return ways;
  }

  function laterals() {
    const ways = {};
    for (const [box, rect] of Object.entries(closed)) {
      if (boxes[box].site && boxes[box].td) {
        const y = middle(rect);
        const inTheWay = (other) => other.left >= rect.right && other.top <= y && y <= other.bottom;
        const free = !Object.values(closed).some(inTheWay);
        ways[box] = { points: [[rect.right, y], [2 * axis - rect.right, y]], free };
      }
    }
    return ways;
  }

  function inlets() {
    const found = {};
    Object.entries(plan.inlets).forEach(([kind, node], i) => {
      const bu = closed[shown(node)];
      const left = 2 * axis - bu.right, top = -(i + 1) * (L.HEIGHT + L.GAP_Y);
      const rect = { left, top, right: left + L.WIDTH, bottom: top + L.HEIGHT };
      let points = [[left + L.WIDTH / 2, rect.bottom], [left + L.WIDTH / 2, bu.top]];
      if (kind === "instruction") {
        const x = 2 * axis + L.LANE, y1 = middle(rect), y2 = middle(bu);
        points = [[rect.right, y1], [x, y1], [x, y2], [2 * axis - bu.left, y2]];
      }
      found[kind] = { rect, points };
    });
    return found;
  }

  const axis = measure(0)[0] + L.LATERAL / 2 - L.MARGIN;
  put(0, 0, 0);
  const ofBoxes = Object.fromEntries(Object.keys(open).map((box) => [box, wires(Number(box))]));
  return { closed, open, wires: ofBoxes, arcs: arcs(), laterals: laterals(), inlets: inlets(), axis };
}
