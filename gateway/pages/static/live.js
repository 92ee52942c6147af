// Keeps the figures that carry data-live up to date; without this script a reload does the same.
(() => {
  const set = (name, value) => document.querySelectorAll(`[data-live="${name}"]`).forEach((e) => { e.textContent = value; });
  const source = new EventSource("/live");
  source.onmessage = (event) => {
    const now = JSON.parse(event.data);
    for (const name of ["devices", "silent", "alerts"]) set(name, now[name].toLocaleString("en"));
    const box = document.getElementById("live-round");
    if (!box) return;
    const was = !box.hidden;
    box.hidden = !now.round;
    if (!now.round) { if (was && document.querySelector("#chart, .danger")) location.reload(); return; }
    for (const name of ["number", "folded", "invited", "seconds", "privacy"]) set(name, now.round[name]);
    const bar = box.querySelector("progress");
    bar.max = now.round.invited || 1;
    bar.value = now.round.folded;
    box.querySelectorAll("[data-state]").forEach((e) => {
      if (e.dataset.state === now.round.state) e.setAttribute("aria-current", "step"); else e.removeAttribute("aria-current");
    });
  };
  source.onerror = () => {
    const state = document.getElementById("state");
    state.textContent = "Stale: the connection to the pages is lost. What you see may be old.";
    state.className = "state bad";
  };
  source.onopen = () => { if (document.getElementById("state").textContent.startsWith("Stale: the connection")) location.reload(); };
})();
