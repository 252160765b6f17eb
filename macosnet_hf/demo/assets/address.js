() => {
  // The address of the page holds tab, mode and settings, so that a reload keeps them and Back works; gradio runs this
  // function once. Tabs and modes are steps of the history, settings are not. Python's part is demo/settings.py.
  const TABS = ["pair", "collection", "about"];
  const button = (tab) => document.querySelector(`#tab-${tab}-button`);
  const asked = () => new URLSearchParams(location.search).get("tab");

  // Writes values into the address; one that is the first value, with which the page starts, goes out of it.
  function write(values, firsts, how) {
    const address = new URL(location.href);
    for (const name in values) {
      if (String(values[name]) === String(firsts[name])) address.searchParams.delete(name);
      else address.searchParams.set(name, values[name]);
    }
    if (address.href !== location.href) history[how](history.state, "", address);
  }
  let timer = null;
  window.macosnetAddress = {
    step: (name, value, first) => write({ [name]: value }, { [name]: first }, "pushState"),
    // Not at each step of a slider: browsers refuse more than some hundred in a while.
    keep: (firsts, values) => {
      clearTimeout(timer);
      const named = Object.fromEntries(Object.keys(firsts).map((name, i) => [name, values[i]]));
      timer = setTimeout(write, 150, named, firsts, "replaceState");
    },
  };

  // Chooses the tab that the address names; gradio may not have drawn it yet.
  function open(tries) {
    const tab = TABS.includes(asked()) ? asked() : TABS[0];
    if (!button(tab)) {
      if (tries > 0) setTimeout(open, 50, tries - 1);
    } else if (button(tab).getAttribute("aria-selected") !== "true") button(tab).click();
  }
  document.addEventListener("click", (event) => {
    const tab = TABS.find((name) => event.target.closest?.(`#tab-${name}-button`));
    if (tab) window.macosnetAddress.step("tab", tab, TABS[0]);
  });
  addEventListener("popstate", () => open(0));
  if (asked()) open(200);
}
