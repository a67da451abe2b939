// Each part is set up where its place is in the page: a section without data has none.

document.documentElement.classList.add("scripted");
document.querySelectorAll("table.sortable").forEach(setUpTable);

const timelinePlace = document.getElementById("timeline");
if (timelinePlace !== null) {
  const timeline = new Timeline(timelinePlace, document.getElementById("readout"), report.saves);
  for (const box of document.querySelectorAll('input[name="measure"]')) {
    box.addEventListener("change", () => {
      if (box.checked) timeline.shown.add(box.value); else timeline.shown.delete(box.value);
      timeline.render();
    });
  }
  for (const choice of document.querySelectorAll('input[name="axis"]')) {
    choice.addEventListener("change", () => timeline.setAxis(choice.value));
  }
  document.querySelector('input[name="logarithmic"]').addEventListener("change", (event) => {
    timeline.logarithmic = event.target.checked;
    timeline.render();
  });
  document.getElementById("whole-run").addEventListener("click", () => {
    timeline.range = timeline.whole;
    timeline.render();
  });
}

const mapPlace = document.getElementById("map");
if (mapPlace !== null) {
  const map = new SpaceMap(mapPlace, report.space);
  map.render();
  map.describe(0);
}
