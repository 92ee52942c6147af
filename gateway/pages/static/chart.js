// Draws the last rounds; the table below holds the same figures.
(() => {
  const box = document.getElementById("chart");
  const series = JSON.parse(box.dataset.series);
  const ink = getComputedStyle(document.body).color;
  const axis = (label) => ({ label, stroke: ink, grid: { stroke: "#8884" }, ticks: { stroke: "#8884" } });
  new uPlot({
    width: Math.max(320, box.clientWidth), height: 240, scales: { x: { time: false } },
    axes: [axis("round"), axis("devices"), { ...axis("seconds"), scale: "s", side: 1 }],
    series: [{ label: "round" }, { label: "devices in the sum", stroke: "#2f7fe0", width: 2 }, { label: "seconds", stroke: "#d0781a", width: 2, scale: "s" }],
  }, [series.number, series.participants, series.seconds], box);
})();
