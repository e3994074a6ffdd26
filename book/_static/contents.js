// The contents at the right mark the section that is being read, also where it is taller than the screen, which the
// theme's scroll spy does not notice.
document.addEventListener("DOMContentLoaded", () => {
  document.body.removeAttribute("data-bs-spy"); // before the spy starts, once the page is loaded
  const links = [...document.querySelectorAll("nav.page-toc a, .bd-toc-nav a")];
  const sections = links.map((link) => document.getElementById(decodeURIComponent(link.hash.slice(1))));
  let waiting = false;

  const mark = () => {
    waiting = false;
    const reading = window.innerHeight / 3;
    const current = sections.findLastIndex((section) => section?.getBoundingClientRect().top <= reading);
    links.forEach((link, k) => {
      link.classList.toggle("active", k === current);
      k === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    });
  };
  const soon = () => {
    if (!waiting) requestAnimationFrame(mark);
    waiting = true;
  };
  if (links.length) {
    window.addEventListener("scroll", soon, { passive: true });
    window.addEventListener("resize", soon);
    mark();
  }
});
