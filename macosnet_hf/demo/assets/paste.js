() => {
  // What the page does with files before gradio sees them; it runs this function once. A pasted image goes to the place under the pointer, else to an empty place, else
  // to the one that was not pasted to last. gradio's own clipboard button stays; it works where the browser allows it.
  let pointed = null, last = null;
  document.addEventListener("pointermove", (event) => { pointed = event; });

  // The places of the tab that is shown; of the stage's photos too, whose places are hidden behind them.
  const visible = () => ["#source", "#target", "#photos"]
    .map((name) => document.querySelector(name))
    .filter((place) => place?.closest("[role=tabpanel]")?.offsetParent);
  const photoPlace = (target) =>
    document.querySelector(["#source", "#target"][target.closest?.("#viewer [data-side]")?.dataset.side] || "none");
  // What an event is about: its target, or what lies under it, for a line of the drawing may be above a photo.
  const placeAt = (event) => [event.target, ...document.elementsFromPoint(event.clientX, event.clientY)]
    .map((element) => visible().find((place) => place.contains(element) || place === photoPlace(element)))
    .find((place) => place);
  const input = (place) => place.querySelector("input[type=file]");
  const choose = (places) =>
    (pointed && placeAt(pointed)) ||
    places.find((place) => !place.querySelector("img") && input(place)) ||
    places.find((place) => place !== last);

  const give = (place, files, tries) => {
    const field = input(place);
    if (field) {
      field.files = files;
      field.dispatchEvent(new Event("change", { bubbles: true }));
      return;
    }
    place.querySelector("button[aria-label='Remove Image']")?.click();
    if (tries > 0) setTimeout(give, 50, place, files, tries - 1);
  };

  // Where a system does not know HEIC, as Windows and Linux, its files have no type, and gradio refuses them.
  const typed = (list) => {
    const files = new DataTransfer();
    for (const file of list) {
      const heic = !file.type && /\.(hei[cf]|hif)$/i.test(file.name);
      files.items.add(heic ? new File([file], file.name, { type: "image/heic" }) : file);
    }
    return [...list].some((file, i) => files.files[i].type !== file.type) ? files.files : null;
  };
  document.addEventListener("change", (event) => {
    const files = event.target.type === "file" && typed(event.target.files);
    if (!files) return;
    event.stopImmediatePropagation();
    event.target.files = files;
    event.target.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);
  document.addEventListener("drop", (event) => {
    const place = placeAt(event), given = event.dataTransfer?.files;
    const files = place && given && (typed(given) || (!place.contains(event.target) && given));
    if (!files) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    give(place, files, 20);
  }, true);

  document.addEventListener("dragover", (event) => { if (event.target.closest?.("#viewer svg")) event.preventDefault(); });

  document.addEventListener("paste", (event) => {
    const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    const places = visible();
    if (!images.length || !places.length) return;
    event.preventDefault();
    const place = choose(places) || places[0];
    const files = new DataTransfer();
    for (const image of place.id === "photos" ? images : images.slice(0, 1)) files.items.add(image);
    last = place;
    give(place, files.files, 20);
  });
}
