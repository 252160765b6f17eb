// The masks of a collection, each on its photo; a click in one says which object is meant, and all follow. gr.HTML runs this
// file, behind photos.js, as the body of a function that gets `element`, `props`, `trigger` and `watch`. A mark is
// [x, y, belongs], in shares of its photo. Python's part is demo/collection_photos.py.
const find = (name) => element.querySelector(name);
const grid = find(".photo-grid");
let shown = null, wished = null, sent = null, belongs = true;

const marks = () => wished || shown?.hints || [];

function say(text) {
  const found = wished ? "Looking for it in all photos ..."
    : marks().flat().length ? "Click on a mark to remove it." : "Wrong object? Click on the right one in any photo.";
  find(".photo-words").textContent = text || found;
  find(".photo-words").classList.toggle("wrong", Boolean(text));
}

function draw() {
  for (const dot of grid.querySelectorAll("i")) dot.remove();
  marks().forEach((those, number) => {
    for (const [x, y, belonging] of those) {
      const dot = window.macosnetPhotos.dot(grid, number, [x, y], belonging ? "+" : "−");
      dot.classList.toggle("belongs", belonging);
      dot.title = `${belonging ? "Belongs to the object" : "Left out"}; click to remove`;
    }
  });
  find(".photo-unhint").disabled = !marks().flat().length;
  say();
}

// Sets a mark, or takes one away that is there. Fingers are wider than a pointer.
function hint(number, photo, [x, y], event) {
  const box = photo.getBoundingClientRect(), reach = event.pointerType === "touch" ? 22 : 12;
  const changed = marks().map((those) => [...those]), those = changed[number];
  const hit = those.findLastIndex(([u, v]) => Math.hypot((u - x) * box.width, (v - y) * box.height) <= reach);
  if (hit < 0 && those.length >= shown.mostHints) {
    say("Enough marks on this photo; remove some to go on.");
    return;
  }
  if (hit >= 0) those.splice(hit, 1); else those.push([x, y, belongs && !event.altKey && !event.shiftKey]);
  wish(changed);
}

// The event takes the marks from here when it is sent, and forgets them if it fails; see demo/hinting.py.
function wish(changed) {
  wished = changed;
  draw();
  trigger("submit");
}
window.macosnetMarks = window.macosnetMarks || {};
window.macosnetMarks["collection-hints"] = {
  send: () => {
    sent = marks();
    return sent;
  },
  undo: () => { wished = null; draw(); },
};

find(".photo-hints").addEventListener("click", (event) => {
  if (!event.target.dataset.belongs) return;
  belongs = event.target.dataset.belongs === "true";
  for (const each of element.querySelectorAll("[data-belongs]")) {
    each.setAttribute("aria-pressed", each === event.target);
  }
});
find(".photo-unhint").addEventListener("click", () => { if (shown) wish(shown.images.map(() => [])); });

function receive() {
  const photos = () => shown?.images.map((image) => [image.name, image.w, image.h]).join();
  const before = photos();
  try { shown = props.value ? JSON.parse(props.value) : null; } catch { shown = null; }
  if (wished === sent || photos() !== before) wished = null; // otherwise there are newer marks, which are sent next
  window.macosnetPhotos.fill(grid, shown?.images || [], "Mark", hint);
  draw();
}

watch("value", receive);
receive();
