// The interactive drawing of a pair. gr.HTML runs this file as the body of a function that gets `element`, `props`,
// `server` and `watch`. The page holds both images and asks the server for two things only: where a point lies in the
// other image, and a grid of points. Coordinates are pixels of the working copies. Python's part is demo/viewer.py.
const find = (name) => element.querySelector(name);
const PIN_COLORS = ["#e11d48", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"];
const MOST_POINTS = 60;
const NO_MATCHES = { lines: [], above: 0, all: 0, faint: false };
let images = null, matches = NO_MATCHES, points = [], waiting = 0, boxes = [], size = [0, 0], drawnWidth = 0;

function parse(text) {
  try { return text ? JSON.parse(text) : null; } catch { return null; }
}

function node(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(made);
  return made;
}

// Side by side at the same height; on a narrow page below one another, which shows twice as much.
function arrange() {
  const width = Math.max(200, find(".viewer-stage").clientWidth), gap = 14;
  const aspects = images.sides.map((side) => Math.min(3, Math.max(0.4, side.w / side.h)));
  const stacked = width < 640 && (aspects[0] + aspects[1]) / 2 > 0.8;
  const fit = (side, x, y, w, h) => {
    const k = Math.min(w / side.w, h / side.h);
    return { x: x + (w - side.w * k) / 2, y: y + (h - side.h * k) / 2, k };
  };
  if (stacked) {
    const tall = aspects.map((aspect) => Math.min(width / aspect, 420));
    boxes = [fit(images.sides[0], 0, 0, width, tall[0]), fit(images.sides[1], 0, tall[0] + gap, width, tall[1])];
    size = [width, tall[0] + gap + tall[1]];
  } else {
    const tall = Math.min((width - gap) / (aspects[0] + aspects[1]), 460);
    const wide = aspects.map((aspect) => aspect * tall);
    boxes = [fit(images.sides[0], 0, 0, wide[0], tall), fit(images.sides[1], wide[0] + gap, 0, wide[1], tall)];
    size = [wide[0] + gap + wide[1], tall];
  }
}

// Pixel k of an image covers [k, k + 1] of the drawing.
const place = (i, x, y) => [boxes[i].x + (x + 0.5) * boxes[i].k, boxes[i].y + (y + 0.5) * boxes[i].k];
const clamp = (i, [x, y]) =>
  [Math.min(Math.max(x, 0), images.sides[i].w - 1), Math.min(Math.max(y, 0), images.sides[i].h - 1)];

function connect(parent, from, to, color, hit) {
  const ends = { x1: from[0], y1: from[1], x2: to[0], y2: to[1] };
  if (hit) node("line", { ...ends, class: "hit" }, parent);
  node("line", { ...ends, class: "halo" }, parent);
  node("line", { ...ends, class: "line", stroke: color }, parent);
}

function drawMatches(parent) {
  parent.replaceChildren();
  const highest = Math.max(1e-9, ...matches.lines.map((line) => line[5]));
  for (const [x, y, u, v, color, score] of matches.lines) {
    const group = node("g", { class: "match", opacity: 0.55 + 0.45 * (score / highest) }, parent);
    const ends = [place(0, x, y), place(1, u, v)];
    connect(group, ...ends, color, true);
    for (const end of ends) node("circle", { cx: end[0], cy: end[1], r: 3.6, fill: color }, group);
    node("title", {}, group).textContent = `score ${score.toFixed(2)}`;
  }
}

function drawPoints(parent) {
  parent.replaceChildren();
  let number = 0;
  for (const point of points) {
    const out = point.at.some((at, i) => clamp(i, at).join() !== at.join());
    if (point.dot && out) continue;
    const group = node("g", { class: `pin${point.dot ? " dot" : ""}${out ? " outside" : ""}` }, parent);
    const ends = point.at.map((at, i) => place(i, ...clamp(i, at)));
    if (point.dot) {
      for (const end of ends) node("circle", { cx: end[0], cy: end[1], r: 5, fill: point.color }, group);
      continue;
    }
    number += 1;
    connect(group, ...ends, point.color, false);
    ends.forEach((end, i) => {
      const kind = i === point.from ? "start" : "end";
      node("circle", { cx: end[0], cy: end[1], r: 10, fill: point.color, class: kind, "data-side": i }, group);
      node("text", { x: end[0], y: end[1] + 0.5 }, group).textContent = number;
    });
  }
}

function summary() {
  const pins = points.filter((point) => !point.dot).length;
  if (pins) return `${pins} ${pins === 1 ? "point and its partner" : "points and their partners"}.`;
  if (points.length) return "The same colour marks the same place on the object.";
  if (!matches.all) return "No matching points on the object.";
  if (!matches.above) return `None of the ${matches.all} matches has so high a score; lower the confidence.`;
  const follow = matchMedia("(hover: none)").matches ? "" : "Move over a line to follow it. ";
  return `${matches.lines.length} of ${matches.all} matches. ${follow}Colours show where on the object a line starts.`;
}

function say(text, wrong) {
  const foot = find(".viewer-foot");
  foot.textContent = text || summary();
  foot.classList.toggle("wrong", Boolean(wrong));
}

function draw() {
  const stage = find(".viewer-stage");
  if (!images) { stage.replaceChildren(); say(" "); return; }
  arrange();
  const svg = node("svg", { width: size[0], height: size[1], viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img" });
  svg.setAttribute("aria-label", "Both photos with lines between matching points");
  images.sides.forEach((side, i) => {
    const box = boxes[i], clip = node("clipPath", { id: `viewer-round-${i}` }, svg);
    const frame = { x: box.x, y: box.y, width: side.w * box.k, height: side.h * box.k };
    node("rect", { ...frame, rx: 8 }, clip);
    node("image", { ...frame, href: side.src, preserveAspectRatio: "none", "data-side": i,
      "clip-path": `url(#viewer-round-${i})` }, svg);
  });
  node("g", { class: "matches" }, svg);
  node("g", { class: "points" }, svg);
  svg.addEventListener("click", add);
  stage.replaceChildren(svg);
  redraw();
}

function redraw() {
  const svg = find("svg");
  if (!svg) return;
  drawMatches(svg.querySelector(".matches"));
  drawPoints(svg.querySelector(".points"));
  svg.classList.toggle("with-points", points.length > 0);
  svg.classList.toggle("faint", matches.faint);
  find(".viewer-clear").disabled = !points.length;
  say();
}

async function ask(work) {
  const id = images.id;
  waiting += 1;
  try {
    const answer = await work(id);
    if (images?.id !== id) return null; // another pair came meanwhile
    if (answer.error) { say(answer.error, true); return null; }
    return answer;
  } catch {
    say("The server did not answer; try again.", true);
    return null;
  } finally { waiting -= 1; }
}

async function add(event) {
  const edge = find("svg").getBoundingClientRect();
  const at = boxes.map((box) => [(event.clientX - edge.left - box.x) / box.k, (event.clientY - edge.top - box.y) / box.k]);
  const from = at.findIndex(([x, y], i) => x >= 0 && y >= 0 && x <= images.sides[i].w && y <= images.sides[i].h);
  if (from < 0) return;
  if (points.filter((point) => !point.dot).length + waiting >= MOST_POINTS) {
    say("Enough points; clear them to go on.", true);
    return;
  }
  const start = clamp(from, at[from].map((value) => value - 0.5));
  const answer = await ask((id) => server.viewer_transfer({ id, point: start, side: from }));
  if (!answer) return;
  points = points.filter((point) => !point.dot);
  const ends = from === 0 ? [start, answer.point] : [answer.point, start];
  points.push({ at: ends, from, color: PIN_COLORS[points.length % PIN_COLORS.length] });
  redraw();
}

find(".viewer-grid").addEventListener("click", async () => {
  if (!images) return;
  const answer = await ask((id) => server.viewer_grid({ id }));
  if (!answer) return;
  points = answer.points.map(([x, y, u, v, color]) => ({ at: [[x, y], [u, v]], from: 0, color, dot: true }));
  redraw();
});
find(".viewer-clear").addEventListener("click", () => { points = []; redraw(); });

// Points stay where only the masks or the threshold changed.
function receive() {
  const sources = () => images?.sides.map((side) => side.src).join();
  const before = sources();
  images = parse(props.images);
  matches = parse(props.value) || NO_MATCHES;
  const same = images && sources() === before;
  if (!same) points = [];
  if (same && find("svg")) redraw(); else draw();
}

watch(["value", "images"], receive);
new ResizeObserver(() => {
  const width = find(".viewer-stage").clientWidth;
  if (width && Math.abs(width - drawnWidth) > 2) { drawnWidth = width; draw(); }
}).observe(find(".viewer-stage"));
receive();
