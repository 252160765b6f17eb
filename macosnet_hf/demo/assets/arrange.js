// Puts the photos of a collection in another order: by dragging one, on a touch screen after a moment, or by Shift and an
// arrow key. gr.HTML runs this file as the body of a function that gets `element` and `trigger`. The gallery is gradio's,
// which draws it anew, so all listeners are of the document. Python's part is demo/arranging.py.
const HOLD = 350, REACH = 6; // milliseconds that a finger rests, pixels that a mouse moves, before a drag begins
const words = element.querySelector(".arrange-words"), WORDS = words.textContent;
const items = () => [...document.querySelectorAll("#photos .gallery-item")];
let drag = null, order = [], waiting = null, timer = null, said = null, dragged = false;

function say(text) {
  clearTimeout(said);
  words.textContent = text;
  said = setTimeout(() => { words.textContent = WORDS; }, 6000);
}

// Sends the numbers of the photos in their new order.
function move(from, to, keyboard) {
  const count = items().length;
  if (waiting || to < 0 || to >= count || from === to) return;
  order = [...Array(count).keys()];
  order.splice(to, 0, ...order.splice(from, 1));
  waiting = { focus: keyboard ? to : -1, words: `Photo ${from + 1} is now photo ${to + 1} of ${count}.` };
  trigger("submit");
}
window.macosnetArrange = {
  send: () => order,
  done: () => {
    items()[waiting?.focus]?.querySelector(".thumbnail-item")?.focus();
    if (waiting) say(waiting.words);
    waiting = null;
  },
};

function mark() {
  items().forEach((item, i) => {
    item.classList.toggle("dragged", Boolean(drag?.begun) && i === drag.from);
    item.classList.toggle("before", Boolean(drag?.begun) && i === drag.to && drag.to < drag.from);
    item.classList.toggle("after", Boolean(drag?.begun) && i === drag.to && drag.to > drag.from);
  });
}

function begin() {
  if (!drag) return;
  drag.begun = true;
  mark();
}

function end(moved) {
  clearTimeout(timer);
  const last = drag;
  drag = null;
  mark();
  if (!last?.begun) return;
  dragged = true; // the click that follows opens no photo
  setTimeout(() => { dragged = false; }, 0);
  if (moved) move(last.from, last.to, false);
}

const ON = {
  pointerdown: (event) => {
    if (event.button || drag || event.target.closest?.(".delete-button")) return;
    const from = items().indexOf(event.target.closest?.("#photos .gallery-item"));
    if (from < 0 || items().length < 2) return;
    drag = { from, to: from, x: event.clientX, y: event.clientY, begun: false, touch: event.pointerType !== "mouse" };
    if (drag.touch) timer = setTimeout(begin, HOLD);
  },
  pointermove: (event) => {
    if (!drag) return;
    if (!drag.touch && !event.buttons) { end(false); return; } // it was let go outside of the window
    if (!drag.begun) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < REACH) return;
      if (drag.touch) { end(false); return; } // it scrolls
      begin();
    }
    const over = document.elementFromPoint(event.clientX, event.clientY)?.closest("#photos .gallery-item");
    if (over) drag.to = items().indexOf(over);
    mark();
  },
  pointerup: () => end(true),
  pointercancel: () => end(false),
  keydown: (event) => {
    if (event.key === "Escape" && drag) end(false);
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const from = items().indexOf(event.target.closest?.("#photos .gallery-item"));
    if (!step || !event.shiftKey || from < 0) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    move(from, from + step, true);
  },
  click: (event) => {
    if (!dragged) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  },
  // The browser's own dragging of images, and its menu for one that a finger rests on.
  dragstart: (event) => { if (event.target.closest?.("#photos .gallery-item")) event.preventDefault(); },
  contextmenu: (event) => { if (drag?.touch) event.preventDefault(); },
};
for (const name in ON) document.addEventListener(name, ON[name], { capture: true });

// While a finger drags nothing scrolls. A listener of the document would slow all scrolling down.
function hold(tries) {
  const still = (event) => { if (drag?.begun) event.preventDefault(); }, gallery = document.querySelector("#photos");
  if (gallery) gallery.addEventListener("touchmove", still, { passive: false });
  else if (tries > 0) setTimeout(hold, 100, tries - 1);
}
hold(100);
