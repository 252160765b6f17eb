"""The interactive image of a pair: lines that can be followed, points that travel. HTML, style and script for a page.

The page holds both photos and asks the server for two things only: where a point lies in the other photo, and
a grid of points. It knows pixels of the working copies, nothing else. Python's part is in `viewer.py`.
"""

TEMPLATE = """
<div class="viewer-bar">
  <span class="viewer-hint"><b>Click anywhere in either photo</b> to see the same place in the other one.</span>
  <span class="viewer-buttons">
    <button type="button" class="viewer-grid">Grid of points</button>
    <button type="button" class="viewer-clear" disabled>Clear points</button>
  </span>
</div>
<div class="viewer-stage"></div>
<div class="viewer-foot" role="status"></div>
"""

STYLE = """
#viewer { padding: 0.75rem; border-radius: var(--block-radius); background: var(--block-background-fill); }
#viewer { border: 1px solid var(--block-border-color); box-shadow: var(--block-shadow); }
#viewer .viewer-bar { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; margin-bottom: 0.6rem; }
#viewer .viewer-hint { flex: 1 1 16rem; }
#viewer .viewer-buttons { display: flex; gap: 0.5rem; }
#viewer button { padding: 0.35rem 0.8rem; border-radius: var(--radius-md); font-size: 0.9rem; cursor: pointer; }
#viewer button { border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill); }
#viewer button { color: var(--button-secondary-text-color); }
#viewer button:hover:not(:disabled) { border-color: var(--color-accent); }
#viewer button:disabled { opacity: 0.45; cursor: default; }
#viewer .viewer-stage { min-height: 8rem; }
#viewer svg { display: block; margin: 0 auto; overflow: visible; touch-action: manipulation; user-select: none; }
#viewer image { cursor: crosshair; }
#viewer .match { transition: opacity 0.12s; }
#viewer .match .hit { stroke: transparent; stroke-width: 11; }
#viewer .match .halo { stroke: #000; stroke-opacity: 0.4; stroke-width: 3.2; }
#viewer .match .line { stroke-width: 1.6; }
#viewer .match circle { stroke: #fff; stroke-width: 1.2; }
#viewer .match line, #viewer .pin line { stroke-linecap: round; }
#viewer .match .halo, #viewer .match .line, #viewer .match circle { pointer-events: none; }
#viewer .matches:has(.match:hover) .match:not(:hover) { opacity: 0.1; }
#viewer .match:hover .halo { stroke-opacity: 0.7; stroke-width: 6; }
#viewer .match:hover .line { stroke-width: 3.4; }
#viewer .match:hover circle { r: 6px; }
#viewer .match:hover { opacity: 1 !important; }
#viewer .with-points .match { opacity: 0; pointer-events: none; }
#viewer .pin { pointer-events: none; }
#viewer .pin .halo { stroke: #000; stroke-opacity: 0.45; stroke-width: 4.5; }
#viewer .pin .line { stroke-width: 2.4; }
#viewer .pin circle { stroke: #fff; stroke-width: 2; filter: drop-shadow(0 1px 1.5px rgb(0 0 0 / 0.55)); }
#viewer .pin text { fill: #fff; font: 700 11px system-ui, sans-serif; text-anchor: middle; }
#viewer .pin text { dominant-baseline: central; }
#viewer .pin.outside circle.end { stroke-dasharray: 3 2; fill-opacity: 0.55; }
#viewer .pin.dot circle { stroke-width: 1.5; }
#viewer .viewer-foot { margin-top: 0.5rem; font-size: 0.875rem; color: var(--body-text-color-subdued); }
#viewer .viewer-foot { min-height: 1.3rem; }
#viewer .viewer-foot.wrong { color: #dc2626; }
"""

SCRIPT = r"""
const find = (name) => element.querySelector(name);
const PIN_COLORS = ["#e11d48", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"];
const MOST_POINTS = 60;
let photos = null, matches = { lines: [], above: 0, all: 0 }, points = [], waiting = 0, boxes = [], size = [0, 0];

function parse(text) {
  try { return text ? JSON.parse(text) : null; } catch { return null; }
}

function node(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(made);
  return made;
}

/* Side by side at the same height; on a narrow page below one another, which shows twice as much. */
function arrange() {
  const width = Math.max(200, find(".viewer-stage").clientWidth), gap = 14;
  const aspects = photos.sides.map((side) => Math.min(3, Math.max(0.4, side.w / side.h)));
  const stacked = width < 640 && (aspects[0] + aspects[1]) / 2 > 0.8;
  const fit = (side, x, y, w, h) => {
    const k = Math.min(w / side.w, h / side.h);
    return { x: x + (w - side.w * k) / 2, y: y + (h - side.h * k) / 2, k };
  };
  if (stacked) {
    const tall = photos.sides.map((side, i) => Math.min(width / aspects[i], 420));
    boxes = [fit(photos.sides[0], 0, 0, width, tall[0]), fit(photos.sides[1], 0, tall[0] + gap, width, tall[1])];
    size = [width, tall[0] + gap + tall[1]];
  } else {
    const tall = Math.min((width - gap) / (aspects[0] + aspects[1]), 460);
    const wide = aspects.map((aspect) => aspect * tall);
    boxes = [fit(photos.sides[0], 0, 0, wide[0], tall), fit(photos.sides[1], wide[0] + gap, 0, wide[1], tall)];
    size = [wide[0] + gap + wide[1], tall];
  }
}

/* The pixel k of a photo covers [k, k + 1] of the drawing. */
const place = (i, x, y) => [boxes[i].x + (x + 0.5) * boxes[i].k, boxes[i].y + (y + 0.5) * boxes[i].k];

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
    const from = place(0, x, y), to = place(1, u, v);
    connect(group, from, to, color, true);
    for (const end of [from, to]) node("circle", { cx: end[0], cy: end[1], r: 3.6, fill: color }, group);
    node("title", {}, group).textContent = "score " + score.toFixed(2);
  }
}

function drawPoints(parent) {
  parent.replaceChildren();
  let number = 0;
  for (const point of points) {
    const inside = (i, [x, y]) => x >= 0 && y >= 0 && x <= photos.sides[i].w - 1 && y <= photos.sides[i].h - 1;
    const held = (i, [x, y]) =>
      [Math.min(Math.max(x, 0), photos.sides[i].w - 1), Math.min(Math.max(y, 0), photos.sides[i].h - 1)];
    const out = point.at.some((at, i) => !inside(i, at));
    const group = node("g", { class: "pin" + (point.dot ? " dot" : "") + (out ? " outside" : "") }, parent);
    const ends = point.at.map((at, i) => place(i, ...held(i, at)));
    if (point.dot) {
      if (out) { group.remove(); continue; }
      for (const end of ends) node("circle", { cx: end[0], cy: end[1], r: 5, fill: point.color }, group);
      continue;
    }
    number += 1;
    connect(group, ends[0], ends[1], point.color, false);
    ends.forEach((end, i) => {
      const kind = i === point.from ? "start" : "end";
      node("circle", { cx: end[0], cy: end[1], r: 10, fill: point.color, class: kind, "data-side": i }, group);
      node("text", { x: end[0], y: end[1] + 0.5 }, group).textContent = number;
    });
  }
}

const follow = matchMedia("(hover: none)").matches ? "The colour of a line tells the place."
  : "Move over a line to follow it; its colour tells the place.";

function tell(text, wrong) {
  const foot = find(".viewer-foot");
  if (!text) {
    const shown = matches.lines.length;
    text = points.length ? "" : !matches.all ? "No matching points on the object."
      : !matches.above ? "None of the " + matches.all + " matches has so high a score; lower the confidence."
      : shown + " of " + matches.all + " matches. " + follow;
    const pins = points.filter((point) => !point.dot).length;
    if (pins) text = pins + (pins === 1 ? " point and its partner" : " points and their partners") + ".";
    else if (points.length) text = "The same colour marks the same place on the object.";
  }
  foot.textContent = text;
  foot.classList.toggle("wrong", Boolean(wrong));
}

function draw() {
  const stage = find(".viewer-stage");
  if (!photos) { stage.replaceChildren(); tell(" "); return; }
  arrange();
  const svg = node("svg", { width: size[0], height: size[1], viewBox: "0 0 " + size[0] + " " + size[1], role: "img" });
  svg.setAttribute("aria-label", "Both photos with lines between matching points");
  photos.sides.forEach((side, i) => {
    const box = boxes[i], clip = node("clipPath", { id: "viewer-round-" + i }, svg);
    const place = { x: box.x, y: box.y, width: side.w * box.k, height: side.h * box.k };
    node("rect", { ...place, rx: 8 }, clip);
    node("image", { ...place, href: side.src, preserveAspectRatio: "none", "data-side": i,
      "clip-path": "url(#viewer-round-" + i + ")" }, svg);
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
  find(".viewer-clear").disabled = !points.length;
  tell();
}

async function ask(work) {
  const id = photos.id;
  waiting += 1;
  try {
    const answer = await work(id);
    if (!photos || photos.id !== id) return null; /* another pair has come meanwhile */
    if (answer.error) { tell(answer.error, true); return null; }
    return answer;
  } catch {
    tell("The server did not answer; try again.", true);
    return null;
  } finally { waiting -= 1; }
}

async function add(event) {
  const edge = find("svg").getBoundingClientRect();
  const x = event.clientX - edge.left, y = event.clientY - edge.top;
  const from = boxes.findIndex((box, i) => {
    const u = (x - box.x) / box.k, v = (y - box.y) / box.k;
    return u >= 0 && v >= 0 && u <= photos.sides[i].w && v <= photos.sides[i].h;
  });
  if (from < 0) return;
  if (points.filter((point) => !point.dot).length + waiting >= MOST_POINTS) {
    tell("Enough points; clear them to go on.", true);
    return;
  }
  const side = photos.sides[from];
  const start = [(x - boxes[from].x) / boxes[from].k - 0.5, (y - boxes[from].y) / boxes[from].k - 0.5]
    .map((value, axis) => Math.min(Math.max(value, 0), (axis ? side.h : side.w) - 1));
  const answer = await ask((id) => server.viewer_transfer({ id, point: start, side: from }));
  if (!answer) return;
  const at = from === 0 ? [start, answer.point] : [answer.point, start];
  points = points.filter((point) => !point.dot);
  points.push({ at, from, color: PIN_COLORS[points.length % PIN_COLORS.length] });
  redraw();
}

find(".viewer-grid").addEventListener("click", async () => {
  if (!photos) return;
  const answer = await ask((id) => server.viewer_grid({ id }));
  if (!answer) return;
  points = answer.points.map(([x, y, u, v, color]) => ({ at: [[x, y], [u, v]], from: 0, color, dot: true }));
  redraw();
});
find(".viewer-clear").addEventListener("click", () => { points = []; redraw(); });

function take() {
  const before = photos && photos.id, width = photos && photos.sides.map((side) => side.src).join();
  photos = parse(props.photos);
  matches = parse(props.value) || { lines: [], above: 0, all: 0 };
  const same = photos && before && photos.sides.map((side) => side.src).join() === width;
  if (!same) points = [];
  if (same && find("svg")) redraw(); else draw();
}

watch(["value", "photos"], take);
let drawnWidth = 0;
new ResizeObserver(() => {
  const width = find(".viewer-stage").clientWidth;
  if (width && Math.abs(width - drawnWidth) > 2) { drawnWidth = width; draw(); }
}).observe(find(".viewer-stage"));
take();
"""


# Run once by the page. An image that is pasted goes to the photo under the pointer, else to an empty place, else
# to the one that was not pasted to last. gradio's own clipboard button stays; it works where the browser allows it.
PASTE = r"""
() => {
  let pointed = null;
  let last = null;
  document.addEventListener("pointerover", (event) => { pointed = event.target; });

  const places = () => ["#source", "#target", "#photos"]
    .map((name) => document.querySelector(name))
    .filter((place) => place && place.offsetParent !== null);
  const input = (place) => place.querySelector("input[type=file]");
  const choose = (found) =>
    found.find((place) => pointed && place.contains(pointed)) ||
    found.find((place) => !place.querySelector("img") && input(place)) ||
    found.find((place) => place !== last);

  const give = (place, files, tries) => {
    const field = input(place);
    if (field) {
      field.files = files;
      field.dispatchEvent(new Event("change", { bubbles: true }));
      return;
    }
    const remove = place.querySelector("button[aria-label='Remove Image']");
    if (remove) remove.click();
    if (tries > 0) setTimeout(give, 50, place, files, tries - 1);
  };

  document.addEventListener("paste", (event) => {
    const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    const found = places();
    if (!images.length || !found.length) return;
    event.preventDefault();
    const place = choose(found) || found[0];
    const several = place.id === "photos";
    const files = new DataTransfer();
    for (const image of several ? images : images.slice(0, 1)) files.items.add(image);
    last = place;
    give(place, files.files, 20);
  });
}
"""
