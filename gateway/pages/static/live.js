// Keeps the figures that carry data-live, the state line and what carries data-refresh up to date; without this script
// a reload does the same.
(() => {
  const set = (name, value) => document.querySelectorAll(`[data-live="${name}"]`).forEach((e) => { e.textContent = value; });
  const say = (style, text) => {
    const state = document.getElementById("state");
    if (state.textContent !== text) state.textContent = text;
    state.className = `state ${style}`;
  };
  const main = document.getElementById("main");
  let wanted = main.dataset.signature, fetching = false;
  // What the page says of alerts, models and rounds is not true any more: take those parts from the page as it is now.
  const refresh = async () => {
    if (fetching || main.dataset.signature === wanted) return;
    fetching = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.redirected) { location.reload(); return; }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of main.querySelectorAll("[data-refresh]")) {
        part.replaceChildren(...fresh.querySelector(`[data-refresh="${part.dataset.refresh}"]`).childNodes);
      }
      main.dataset.signature = fresh.getElementById("main").dataset.signature;
    } catch { // no such part, or no answer: it is tried again
    } finally { fetching = false; setTimeout(refresh, 2000); }
  };
  const follow = (round) => {
    const box = document.getElementById("live-round");
    if (!box) return;
    const was = !box.hidden;
    box.hidden = !round;
    if (!round) { if (was && document.querySelector("#chart, .danger")) location.reload(); return; }
    for (const name of ["number", "folded", "invited", "seconds", "privacy"]) set(name, round[name]);
    const bar = box.querySelector("progress");
    bar.max = round.invited || 1;
    bar.value = round.folded;
    box.querySelectorAll("[data-state]").forEach((e) => {
      if (e.dataset.state === round.state) e.setAttribute("aria-current", "step"); else e.removeAttribute("aria-current");
    });
  };
  const source = new EventSource("/live");
  source.onmessage = (event) => {
    const now = JSON.parse(event.data);
    say(now.state.style, now.state.text);
    for (const name of ["devices", "silent", "alerts"]) set(name, now[name].toLocaleString("en"));
    if (main.dataset.signature) { wanted = now.signature; refresh(); }
    follow(now.round);
  };
  source.addEventListener("ended", () => { source.close(); location.reload(); }); // the log-in is over
  source.onerror = () => say("bad", "Stale: the connection to the pages is lost. What you see may be old.");
  source.onopen = () => { if (document.getElementById("state").textContent.startsWith("Stale: the connection")) location.reload(); };
})();
