// What is wider than its place scrolls by itself: it fades at the right while there is more, and a keyboard can scroll it.
document.addEventListener("DOMContentLoaded", () => {
  const mark = (box) => {
    const hidden = box.scrollWidth - box.clientWidth;
    box.classList.toggle("more-right", hidden - box.scrollLeft > 1);
    if (box.matches("div.math")) return; // MathJax gives each formula a stop of its own
    hidden > 1 ? (box.tabIndex = 0) : box.removeAttribute("tabindex");
  };
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  const boxes = "figure, .image-reference, .pst-scrollable-table-container, .cell_output > .text_html, div.math";
  for (const box of document.querySelectorAll(`article :is(${boxes})`)) {
    observer.observe(box);
    box.addEventListener("scroll", () => mark(box), { passive: true });
  }
});
