// Cells' code can be hidden, for those who read the argument first. The choice holds on all pages.
function setCode(state) {
  document.documentElement.dataset.code = state;
  document.querySelectorAll(".btn-code-button").forEach(button => {
    button.setAttribute("aria-pressed", state === "hidden");
  });
}
function toggleCode() {
  const state = document.documentElement.dataset.code === "hidden" ? "shown" : "hidden";
  localStorage.setItem("code", state);
  setCode(state);
}
const startWithCode = () => setCode(localStorage.getItem("code") ?? "shown");
startWithCode(); // before the page is drawn, and once its button is there
addEventListener("DOMContentLoaded", startWithCode);

// A figure that scrolls sideways can be scrolled with the keyboard too, as the theme does for code.
function makeFiguresScrollable() {
  document.querySelectorAll(".bd-article figure").forEach(figure => {
    if (figure.scrollWidth > figure.clientWidth) figure.tabIndex = 0;
    else figure.removeAttribute("tabindex");
  });
}
addEventListener("load", makeFiguresScrollable);
addEventListener("resize", makeFiguresScrollable);

// Paper is white, and has no place to click: print in the light theme with everything unfolded.
let theme;
let unfolded = [];
addEventListener("beforeprint", () => {
  theme = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  unfolded = [...document.querySelectorAll("details:not([open])")];
  unfolded.forEach(details => { details.open = true; });
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = theme;
  unfolded.forEach(details => { details.open = false; });
});
