// The images of a collection; a click in one shows the point in all. gr.HTML runs this file, behind photos.js, as the body
// of a function that gets `element`, `props`, `server` and `watch`. Coordinates are pixels of the working copies. Python's
// part is demo/collection_points.py.
const COLORS = ["#e11d48", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"];
const HINT = "Click a point in any photo to see it in all.";
const grid = element.querySelector(".photo-grid"), words = element.querySelector(".photo-words");
let shown = null, count = 0;

function receive() {
  try { shown = props.value ? JSON.parse(props.value) : null; } catch { shown = null; }
  count = 0;
  words.textContent = HINT;
  window.macosnetPhotos.fill(grid, shown?.images || [], "Point", add);
}

async function add(number, _photo, at) {
  const { id, images } = shown, { w, h } = images[number];
  const within = (share, length) => Math.min(Math.max(share * length - 0.5, 0), length - 1);
  let answer;
  try {
    answer = await server.collection_transfer({ id, point: [within(at[0], w), within(at[1], h)], image: number });
  } catch {
    answer = { error: "The server did not answer; try again." };
  }
  if (shown?.id !== id) return;
  words.textContent = answer.error || HINT;
  if (answer.error) return;
  const color = COLORS[count++ % COLORS.length];
  answer.points.forEach((point, i) => {
    const image = images[i];
    if (!point || point[0] < -0.5 || point[1] < -0.5 || point[0] > image.w - 0.5 || point[1] > image.h - 0.5) return;
    const at = [(point[0] + 0.5) / image.w, (point[1] + 0.5) / image.h];
    window.macosnetPhotos.dot(grid, i, at, count).style.background = color;
  });
}

watch("value", receive);
receive();
