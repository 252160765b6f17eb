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
  const written = {}; // what was written last of the settings of each tab
  window.macosnetAddress = {
    step: (name, value, first) => write({ [name]: value }, { [name]: first }, "pushState"),
    // Not at each step of a slider: browsers refuse more than some hundred in a while.
    // A number that was typed may lie outside of what its slider takes: `ranges` holds the least and the most.
    keep: (firsts, ranges, values) => {
      clearTimeout(timer);
      const within = (value, [least, most]) => Math.min(Math.max(value, least), most);
      const named = {};
      Object.keys(firsts).forEach((name, i) => {
        named[name] = ranges[name] ? within(values[i], ranges[name]) : values[i];
      });
      written[Object.keys(firsts)] = [named, firsts];
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
  addEventListener("popstate", () => {
    open(0);
    // The step before may be older than a setting, which stays as it is on the page.
    for (const [named, firsts] of Object.values(written)) write(named, firsts, "replaceState");
  });
  if (asked()) open(200);
}
