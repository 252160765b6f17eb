// The stage of a pair: both photos, and on them what the mode says. gr.HTML runs this file as the body of a function that
// gets `element`, `props`, `server`, `trigger` and `watch`. The page holds both images and asks the server for where a
// point lies in the other image, a grid of points, and the layers of a mode. Coordinates are pixels of the working
// copies. Python's part is demo/viewer.py.
const find = (name) => element.querySelector(name);
const PIN_COLORS = ["#e11d48", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"];
const MOST_POINTS = 60;
const HINTED = ["masks", "cutout"]; // modes in which a click says which object is meant
const PLACES = ["source", "target"]; // element ids of the photos' upload places
const NO_MATCHES = { lines: [], above: 0, all: 0, faint: false };
const WORDS = {
  masks: "The object of each photo, outlined.",
  cutout: "The object alone; Download has it with a transparent background.",
  warp: "Photo B, and photo A warped onto it. Move the line.",
  parts: "The same colour marks the same part in both photos.",
};
let images = null, matches = NO_MATCHES, points = [], waiting = 0, boxes = [], size = [0, 0], drawnWidth = 0;
let mode = asked(), layers = {}, old = {}, share = 0.5, heat = null, cursor = null;
// Marks that the result does not have yet, those of them that were sent, and whether a click sets one of what belongs.
let wished = null, sent = null, belongs = true;

// The mode that the address names.
function asked() {
  const name = new URLSearchParams(location.search).get("mode");
  return [...element.querySelectorAll("[data-mode]")].some((button) => button.dataset.mode === name) ? name : "matches";
}

function parse(text) {
  try { return text ? JSON.parse(text) : null; } catch { return null; }
}

function node(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(made);
  return made;
}

// Side by side at the same height; on a narrow page below one another, which shows twice as much; one image for a warp.
function arrange() {
  const stage = find(".viewer-stage"), width = Math.max(200, stage.clientWidth), gap = 14;
  const highest = parseFloat(getComputedStyle(stage).minHeight);
  const aspects = images.sides.map((side) => Math.min(3, Math.max(0.4, side.w / side.h)));
  const stacked = width < 640 && (aspects[0] + aspects[1]) / 2 > 0.8;
  const fit = (side, x, y, w, h) => {
    const k = Math.min(w / side.w, h / side.h);
    return { x: x + (w - side.w * k) / 2, y: y + (h - side.h * k) / 2, k };
  };
  if (mode === "warp") {
    size = [width, Math.min(width / aspects[1], highest)];
    boxes = [null, fit(images.sides[1], 0, 0, ...size)];
  } else if (stacked) {
    const tall = aspects.map((aspect) => Math.min(width / aspect, highest));
    boxes = [fit(images.sides[0], 0, 0, width, tall[0]), fit(images.sides[1], 0, tall[0] + gap, width, tall[1])];
    size = [width, tall[0] + gap + tall[1]];
  } else {
    const tall = Math.min((width - gap) / (aspects[0] + aspects[1]), highest);
    const wide = aspects.map((aspect) => aspect * tall);
    boxes = [fit(images.sides[0], 0, 0, wide[0], tall), fit(images.sides[1], wide[0] + gap, 0, wide[1], tall)];
    size = [wide[0] + gap + wide[1], tall];
  }
}

// Pixel k of an image covers [k, k + 1] of the drawing.
const place = (i, x, y) => [boxes[i].x + (x + 0.5) * boxes[i].k, boxes[i].y + (y + 0.5) * boxes[i].k];
const clamp = (i, [x, y]) =>
  [Math.min(Math.max(x, 0), images.sides[i].w - 1), Math.min(Math.max(y, 0), images.sides[i].h - 1)];

const hinted = () => HINTED.includes(mode);
const still = () => mode in WORDS && !hinted(); // a click says nothing
const marks = () => wished || images?.hints || [[], []]; // of both photos [x, y, belongs], in shares of them

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

function drawMarks(parent) {
  parent.replaceChildren();
  marks().forEach((those, i) => {
    for (const [u, v, belonging] of those) {
      const { x, y, width, height } = frame(i), [cx, cy] = [x + u * width, y + v * height];
      const group = node("g", { class: belonging ? "hint belongs" : "hint", "data-side": i }, parent);
      node("circle", { cx, cy, r: 10 }, group);
      node("path", { d: `M${cx - 5} ${cy}h10${belonging ? `M${cx} ${cy - 5}v10` : ""}` }, group);
      node("title", {}, group).textContent = `${belonging ? "Belongs to the object" : "Left out"}; click to remove`;
    }
  });
}

function summary() {
  if (hinted()) {
    if (wished) return "Looking for it in both photos ...";
    return `${WORDS[mode]} ${marks().flat().length ? "Click on a mark to remove it." : "Wrong object? Click on the right one."}`;
  }
  if (mode in WORDS) return WORDS[mode];
  const pins = points.filter((point) => !point.dot).length;
  if (mode === "points") {
    if (pins) return `${pins} ${pins === 1 ? "point and its partner" : "points and their partners"}.`;
    if (points.length) return "The same colour marks the same place on the object.";
    return "Click anywhere in either photo to see the same place in the other one.";
  }
  if (mode === "heat") {
    return heat ? `Bright: similar to the point in photo ${"AB"[heat.from]}. Click any other point.`
      : "Click a point to see what is similar to it in the other photo.";
  }
  if (!matches.all) return "No matching points on the object.";
  if (!matches.above) return `None of the ${matches.all} matches has so high a score; lower the confidence.`;
  return `${matches.lines.length} of ${matches.all} matches. Click anywhere in either photo to see the same place in the other one.`;
}

function say(text, wrong) {
  const foot = find(".viewer-words");
  foot.textContent = text || summary();
  foot.classList.toggle("wrong", Boolean(wrong));
}

function frame(i) {
  const { w, h } = images.sides[i], { x, y, k } = boxes[i];
  return { x, y, width: w * k, height: h * k };
}

function layer(parent, i, href, name) {
  return node("image", { ...frame(i), href, preserveAspectRatio: "none", "data-side": i, class: name,
    "clip-path": `url(#viewer-round-${i})` }, parent);
}

// Name and button of a photo, in the corner of it.
function label(canvas, i) {
  const { x, y } = frame(i), side = images.sides[i];
  const corner = document.createElement("div");
  corner.className = "viewer-corner";
  [corner.style.left, corner.style.top] = [`${x}px`, `${y}px`];
  const name = document.createElement("b");
  [name.textContent, name.title] = [`Photo ${"AB"[i]}`, side.name];
  const change = document.createElement("button");
  change.type = "button";
  change.textContent = "Change";
  change.setAttribute("aria-label", `Change photo ${"AB"[i]}`);
  // Its place is empty then, and takes another file, a paste or the camera.
  change.addEventListener("click", () =>
    document.querySelector(`#${PLACES[i]} button[aria-label='Remove Image']`)?.click());
  corner.append(name, change);
  canvas.append(corner);
}

function draw() {
  const stage = find(".viewer-stage");
  element.dataset.mode = mode;
  for (const button of element.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", button.dataset.mode === mode);
  }
  if (!images) { stage.replaceChildren(); say(" "); return; }
  arrange();
  const svg = node("svg", { width: size[0], height: size[1], viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img" });
  const names = images.sides.map((side, i) => `photo ${"AB"[i]}, ${side.name}`).join(", and ");
  svg.setAttribute("aria-label", `${mode}: ${names}. ${still() ? "" : "Arrows move a cross, Enter sets a point."}`);
  const shown = boxes[0] ? [0, 1] : [1];
  for (const i of shown) node("rect", { ...frame(i), rx: 8 }, node("clipPath", { id: `viewer-round-${i}` }, svg));
  for (const i of shown) layer(svg, i, images.sides[i].src, "photo");
  (layers[mode] || old[mode])?.sides.forEach((src, i) => { if (src && boxes[i]) layer(svg, i, src, "over"); });
  if (mode === "warp") drawSlide(svg);
  node("g", { class: "matches" }, svg);
  node("g", { class: "points" }, svg);
  svg.addEventListener("click", add);
  if (!still()) {
    svg.setAttribute("tabindex", 0);
    svg.setAttribute("role", "application");
    svg.addEventListener("keydown", key);
  }
  const canvas = document.createElement("div");
  canvas.className = "viewer-canvas";
  canvas.style.width = `${size[0]}px`;
  canvas.append(svg);
  for (const i of shown) label(canvas, i);
  const focused = stage.contains(document.activeElement) && document.activeElement.matches("svg:focus-visible");
  stage.replaceChildren(canvas);
  if (focused) svg.focus();
  redraw();
}

// A line; left of it photo B, right of it photo A warped onto it.
function drawSlide(svg) {
  const { x, y, width, height } = frame(1), at = x + share * width;
  svg.querySelector(".slide")?.remove();
  const group = node("g", { class: "slide" }, svg);
  const clip = node("clipPath", { id: "viewer-after" }, group);
  node("rect", { x: at, y, width: x + width - at, height }, clip);
  svg.querySelector(".over")?.setAttribute("clip-path", "url(#viewer-after)");
  node("line", { x1: at, x2: at, y1: y, y2: y + height }, group);
  node("circle", { cx: at, cy: y + height / 2, r: 15 }, group);
  node("path", { d: `M${at - 4} ${y + height / 2 - 5}l-5 5 5 5m8-10 5 5-5 5` }, group);
  find(".viewer-slide").value = 100 * share;
}

function slideTo(value) {
  share = Math.min(1, Math.max(0, value));
  if (mode === "warp" && find("svg")) drawSlide(find("svg"));
}

function drag(event) {
  if (mode !== "warp" || !images || !event.buttons || !event.target.closest("svg")) return;
  const { x, width } = frame(1);
  slideTo((event.clientX - find("svg").getBoundingClientRect().left - x) / width);
}

function drawHeat(svg) {
  svg.querySelector(".over")?.remove();
  if (heat) layer(svg, 1 - heat.from, heat.src, "over");
  const marks = svg.querySelector(".points");
  svg.append(marks);
  marks.replaceChildren();
  for (const [i, at] of heat ? [[heat.from, heat.at], [1 - heat.from, heat.best]] : []) {
    const [cx, cy] = place(i, ...at), start = i === heat.from;
    const group = node("g", { class: "pin" }, marks);
    node("circle", { cx, cy, r: start ? 8 : 11, fill: start ? PIN_COLORS[0] : "none", "data-side": i }, group);
  }
}

async function heatOf(point, from) {
  const answer = await ask((id) => server.viewer_heat({ id, point, side: from }));
  if (!answer) return;
  heat = { from, at: point, ...answer };
  if (mode === "heat") redraw();
}

function redraw() {
  const svg = find("svg");
  if (!svg) return;
  if (mode === "matches") drawMatches(svg.querySelector(".matches"));
  if (mode === "points") drawPoints(svg.querySelector(".points"));
  if (mode === "heat") drawHeat(svg);
  if (hinted()) drawMarks(svg.querySelector(".points"));
  find(".viewer-unhint").disabled = !marks().flat().length;
  drawCursor();
  svg.classList.toggle("faint", matches.faint);
  find(".viewer-clear").disabled = !points.length;
  say();
}

// The layers of a mode are asked for when it is chosen, once for each result.
async function show(chosen) {
  mode = chosen;
  draw();
  if (mode === "heat" && images && !heat && matches.lines.length) {
    await heatOf(matches.lines[0].slice(0, 2), 0); // so that there is something to see
  }
  if (!images || layers[chosen] || !(chosen in WORDS)) return;
  const answer = await ask((id) => server.viewer_layers({ id, mode: chosen }));
  if (!answer) return;
  layers[chosen] = answer;
  if (mode === chosen) draw();
}

// What the visitor chooses is a step of the browser's history.
function choose(chosen) {
  window.macosnetAddress?.step("mode", chosen, "matches");
  return show(chosen);
}

function back() {
  if (!element.isConnected) removeEventListener("popstate", back);
  else if (asked() !== mode) show(asked());
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

function add(event) {
  if (still()) return;
  const edge = find("svg").getBoundingClientRect();
  const at = boxes.map((box) => [(event.clientX - edge.left - box.x) / box.k, (event.clientY - edge.top - box.y) / box.k]);
  const from = at.findIndex(([x, y], i) => x >= 0 && y >= 0 && x <= images.sides[i].w && y <= images.sides[i].h);
  if (from < 0) return;
  const start = clamp(from, at[from].map((value) => value - 0.5));
  if (hinted()) hint(event, from, start); else addAt(from, start);
}

// Sets a mark, or takes one away that is there. Fingers are wider than a pointer.
function hint(event, i, [x, y]) {
  const { w, h } = images.sides[i], reach = event.pointerType === "touch" ? 22 : 12;
  const changed = marks().map((those) => [...those]), those = changed[i];
  const hit = those.findLastIndex(([u, v]) => Math.hypot(u * w - x - 0.5, v * h - y - 0.5) * boxes[i].k <= reach);
  if (hit < 0 && those.length >= images.mostHints) {
    say("Enough marks on this photo; remove some to go on.", true);
    return;
  }
  if (hit >= 0) those.splice(hit, 1);
  else those.push([(x + 0.5) / w, (y + 0.5) / h, belongs && !event.altKey && !event.shiftKey]);
  wish(changed);
}

// The event takes the marks from here when it is sent, and forgets them if it fails; see demo/hinting.py.
function wish(changed) {
  wished = changed;
  redraw();
  trigger("submit");
}
window.macosnetMarks = window.macosnetMarks || {};
window.macosnetMarks.hints = {
  send: () => {
    sent = marks();
    return sent;
  },
  undo: () => { wished = null; redraw(); },
};

async function addAt(from, start) {
  if (mode !== "heat" && points.filter((point) => !point.dot).length + waiting >= MOST_POINTS) {
    say("Enough points; clear them to go on.", true);
    return;
  }
  if (mode === "heat") { await heatOf(start, from); return; }
  const answer = await ask((id) => server.viewer_transfer({ id, point: start, side: from }));
  if (!answer) return;
  points = points.filter((point) => !point.dot);
  const ends = from === 0 ? [start, answer.point] : [answer.point, start];
  points.push({ at: ends, from, color: PIN_COLORS[points.length % PIN_COLORS.length] });
  if (mode === "matches") choose("points"); else redraw();
}

// By keyboard: arrows move a cross, over the border of a photo into the other one, and Enter clicks there.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function key(event) {
  if (still() || !(event.key in ARROWS || event.key === "Enter")) return;
  event.preventDefault();
  cursor ||= { from: 0, at: [images.sides[0].w / 2, images.sides[0].h / 2] };
  if (event.key === "Enter") {
    if (hinted()) hint(event, cursor.from, clamp(cursor.from, cursor.at)); else addAt(cursor.from, cursor.at);
    return;
  }
  const side = images.sides[cursor.from], step = Math.max(side.w, side.h) / 40, [right, down] = ARROWS[event.key];
  const moved = [cursor.at[0] + right * step, cursor.at[1] + down * step];
  const stacked = boxes[1].y > boxes[0].y + images.sides[0].h * boxes[0].k / 2;
  const [value, end, forward] = stacked ? [moved[1], side.h, down] : [moved[0], side.w, right];
  if ((cursor.from === 0 && forward > 0 && value > end) || (cursor.from === 1 && forward < 0 && value < 0)) {
    cursor = { from: 1 - cursor.from, at: [images.sides[1 - cursor.from].w / 2, images.sides[1 - cursor.from].h / 2] };
  } else cursor.at = clamp(cursor.from, moved);
  drawCursor();
}

function drawCursor() {
  const svg = find("svg");
  svg?.querySelector(".cursor")?.remove();
  if (!svg || !cursor || still()) return;
  const [x, y] = place(cursor.from, ...cursor.at);
  const d = `M${x - 12} ${y}h24M${x} ${y - 12}v24`;
  const group = node("g", { class: "cursor" }, svg);
  for (const name of ["halo", "line"]) node("path", { d, class: name }, group);
}

find(".viewer-grid").addEventListener("click", async () => {
  if (!images) return;
  const answer = await ask((id) => server.viewer_grid({ id }));
  if (!answer) return;
  points = answer.points.map(([x, y, u, v, color]) => ({ at: [[x, y], [u, v]], from: 0, color, dot: true }));
  redraw();
});
find(".viewer-clear").addEventListener("click", () => { points = []; redraw(); });
find(".viewer-hints").addEventListener("click", (event) => {
  if (!event.target.dataset.belongs) return;
  belongs = event.target.dataset.belongs === "true";
  for (const each of find(".viewer-hints").querySelectorAll("[data-belongs]")) {
    each.setAttribute("aria-pressed", each === event.target);
  }
});
find(".viewer-unhint").addEventListener("click", () => { if (images) wish([[], []]); });
find(".viewer-modes").addEventListener("click", (event) => {
  if (event.target.dataset.mode) choose(event.target.dataset.mode);
});
find(".viewer-slide").addEventListener("input", (event) => slideTo(event.target.value / 100));
for (const kind of ["pointerdown", "pointermove"]) find(".viewer-stage").addEventListener(kind, drag);

// Points, and layers until there are new ones, stay where only the masks or the threshold changed.
function receive() {
  const sources = () => images?.sides.map((side) => side.src).join();
  const [before, id] = [sources(), images?.id];
  images = parse(props.images);
  matches = parse(props.value) || NO_MATCHES;
  const same = images && sources() === before;
  if (!same) [points, heat, cursor] = [[], null, null];
  if (images && images.id === id && find("svg")) { redraw(); return; }
  if (!same || wished === sent) wished = null; // otherwise there are newer marks, which are sent next
  [layers, old] = [{}, same ? { ...old, ...layers } : {}];
  show(mode);
}

addEventListener("popstate", back);
watch(["value", "images"], receive);
new ResizeObserver(() => {
  const width = find(".viewer-stage").clientWidth;
  if (width && Math.abs(width - drawnWidth) > 2) { drawnWidth = width; draw(); }
}).observe(find(".viewer-stage"));
receive();
