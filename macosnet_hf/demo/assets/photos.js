// A grid of the photos of a collection, each a button; points.js and masks.js stand behind it in one script. `clicked`
// gets the number of the photo, its image, the place of the click in shares of it, and the event; a key has no place and
// means the middle.
window.macosnetPhotos = window.macosnetPhotos || {};
window.macosnetPhotos.fill = function fill(grid, images, what, clicked) {
  const focused = [...grid.children].findIndex((figure) => figure.contains(document.activeElement));
  grid.replaceChildren(...images.map((image, number) => {
    const figure = document.createElement("figure"), button = document.createElement("button");
    const photo = document.createElement("img"), caption = document.createElement("figcaption");
    [photo.src, photo.alt, button.type] = [image.src, image.name, "button"];
    [photo.width, photo.height] = [image.w, image.h]; // so that nothing moves when it is there
    button.setAttribute("aria-label", `${what} in ${image.name}; by keyboard, its middle`);
    button.append(photo);
    button.addEventListener("click", (event) => {
      const box = photo.getBoundingClientRect();
      const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      clicked(number, photo, event.detail ? at.map((share) => Math.min(Math.max(share, 0), 1)) : [0.5, 0.5], event);
    });
    caption.textContent = image.odd ? `odd one out: ${image.name}` : image.name;
    caption.title = image.name;
    figure.classList.toggle("odd", image.odd);
    figure.append(button, caption);
    return figure;
  }));
  grid.children[focused]?.querySelector("button").focus({ preventScroll: true });
};

// A dot on a photo of the grid, at a place in shares of it.
window.macosnetPhotos.dot = function dotOn(grid, number, [x, y], text) {
  const dot = document.createElement("i");
  dot.textContent = text;
  dot.style.cssText = `left: ${100 * x}%; top: ${100 * y}%`;
  grid.children[number].querySelector("button").append(dot);
  return dot;
};
