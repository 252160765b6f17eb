// Notes the key of the result that a tab shows, for a reload. The storage is that of the browser's tab alone; the address,
// which people give away, holds nothing of it. gr.HTML runs this file as the body of a function that gets `element`, `props`
// and `watch`. Python's part is demo/last_result.py.
function note() {
  const { name, key } = JSON.parse(props.value || "{}");
  if (!name) return;
  try {
    if (key) sessionStorage.setItem(name, key); else sessionStorage.removeItem(name);
  } catch {} // some browsers have no storage
}

watch("value", note);
note();
