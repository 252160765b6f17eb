// The images of a collection; a click in one shows the point in all. gr.HTML runs this file as the body of a function that
// gets `element`, `props`, `server` and `watch`. Coordinates are pixels of the working copies. Python's part is
// demo/collection_points.py.
const COLORS = ["#e11d48", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"];
const HINT = "Click a point in any photo to see it in all.";
const grid = element.querySelector(".points-grid"), words = element.querySelector(".points-words");
let shown = null, count = 0;

function receive() {
  try { shown = props.value ? JSON.parse(props.value) : null; } catch { shown = null; }
  count = 0;
  words.textContent = HINT;
  grid.replaceChildren(...(shown?.images || []).map((image, number) => {
    const figure = document.createElement("figure"), button = document.createElement("button");
    const photo = document.createElement("img"), caption = document.createElement("figcaption");
    [photo.src, photo.alt, button.type] = [image.src, image.name, "button"];
    button.setAttribute("aria-label", `Point in ${image.name}; by keyboard, its middle`);
    button.append(photo);
    button.addEventListener("click", (event) => add(number, photo, event));
    caption.textContent = image.odd ? `odd one out: ${image.name}` : image.name;
    figure.classList.toggle("odd", image.odd);
    figure.append(button, caption);
    return figure;
  }));
}

async function add(number, photo, event) {
  const { id, images } = shown, { w, h } = images[number], box = photo.getBoundingClientRect();
  const within = (share, length) => Math.min(Math.max(share * length - 0.5, 0), length - 1);
  // A key has no place.
  const at = event.detail ? [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height] : [0.5, 0.5];
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
    const dot = document.createElement("i");
    dot.textContent = count;
    dot.style.cssText =
      `background: ${color}; left: ${(100 * (point[0] + 0.5)) / image.w}%; top: ${(100 * (point[1] + 0.5)) / image.h}%`;
    grid.children[i].querySelector("button").append(dot);
  });
}

watch("value", receive);
receive();
